"""Copies of modules as they are in the middle of a training."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


def copied(module: Module) -> Module:
    """Return a copy that shares nothing with a module.

    Tensors that modules keep of a forward pass (features, attention maps, the weights that `weight_norm` computes) are
    copied without the graph that hangs on them, with which torch copies none. A LightningModule's copy is on its own,
    without the Trainer.

    Example:
        >>> import torch
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
        >>> layer.seen = layer(torch.ones(1, 2))
        >>> other = copied(layer)
        >>> torch.equal(other.seen, layer.seen), other.seen.requires_grad, other.bias is layer.bias
        (True, False, False)
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        if (trainer := vars(part).get("_trainer")) is not None:
            memo[id(trainer)] = None
        for kept in tree_leaves(vars(part)):
            if isinstance(kept, Tensor) and not kept.is_leaf:
                memo[id(kept)] = kept.detach().clone()
    return copy.deepcopy(module, memo)
