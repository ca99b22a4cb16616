"""What an optimizer holds of pruned weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.core.types import Masks, Name
from lightning_prune.model.apply import apply_masks_


def parameter_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the ids of all parameters that the optimizers step."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def trained_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the ids of the parameters that the optimizers step and that are not frozen."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(p) for group in groups for p in group["params"] if p.requires_grad}


def mask_state_(optimizers: Iterable[Optimizer], targets: Mapping[Name, nn.Parameter], masks: Masks) -> None:
    """Zero what optimizers remember of pruned weights: each state tensor of the weight's shape (momenta, averages).

    LBFGS keeps one flat history of all parameters, which belongs to another subspace now: it starts anew.
    """
    tensors: list[Tensor] = []
    their_masks: list[Tensor] = []
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            optimizer.state.clear()
            continue
        for name, mask in masks.items():
            for value in optimizer.state.get(targets[name], {}).values():
                if torch.is_tensor(value) and value.shape == mask.shape:
                    tensors.append(value)
                    their_masks.append(mask)
    apply_masks_(tensors, their_masks)
