"""On what two models are compared: the example, and where that tells nothing, the same with noise mixed in.

Of zeros, a network without biases makes zeros, whatever its weights: on them the masked model equals any small one.
So it is where all that could tell passes through a parameter that is zero, as layer scales and last layers often begin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.graph import Couplings

SEED = 0
DEVIATION = 0.1
"""Of the noise in parameters; that of inputs is 1."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What two models are compared on.

    Args:
        args: positional arguments of the call.
        kwargs: keyword arguments.
        tensors: values that stand for those of some parameters, in both models.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def can_tell(probe: Probe) -> bool:
    """Whether a call has an input that varies; integers, such as tokens, always tell.

    Example:
        >>> can_tell(Probe((torch.zeros(2, 3),), {})), can_tell(Probe((torch.arange(3.0),), {}))
        (False, True)
    """
    given = [
        t for t in tree_leaves((probe.args, dict(probe.kwargs))) if isinstance(t, Tensor) and t.numel() > 1
    ]
    return not given or not all(t.is_floating_point() and is_constant(t) for t in given)


def says_something(outputs: Iterable[Tensor]) -> bool:
    """Whether any floating-point output differs from zero.

    Example:
        >>> says_something([torch.zeros(2)]), says_something([torch.ones(2)])
        (False, True)
    """
    return any(bool((t != 0).any()) for t in outputs if t.is_floating_point() or t.is_complex())


def is_constant(tensor: Tensor) -> bool:
    """Whether all entries are the same number."""
    return bool((tensor == tensor.flatten()[0]).all())


def with_noise(couplings: Couplings) -> Probe:
    """Return the traced call with noise on its inputs, and on the parameters whose entries are all the same."""
    draw = torch.Generator().manual_seed(SEED)

    def noisy(tensor: Tensor, deviation: float) -> Tensor:
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64) * deviation
        return (tensor.detach() + noise.to(tensor.device)).to(tensor.dtype)

    args, kwargs = tree_map_only(
        Tensor,
        lambda t: noisy(t, 1.0) if t.is_floating_point() else t,
        (couplings.run.args, dict(couplings.run.kwargs)),
    )
    blank = {
        name: noisy(tensor, DEVIATION)
        for name, (tensor, _) in couplings.record.tensors.items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and is_constant(tensor)
    }
    return Probe(args, kwargs, blank)
