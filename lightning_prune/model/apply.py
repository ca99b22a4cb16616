"""Masks applied to weights, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set pruned weights to zero."""
    if tensors:
        torch._foreach_mul_(list(tensors), list(masks))
