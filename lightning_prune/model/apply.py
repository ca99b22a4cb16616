"""Masks applied to weights, in place and after every optimizer step: the part of pruning that is always paid for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = (
    1 << 18
)  # weights masked at a time on CPU: their part of the mask, widened to the weights' size, stays in cache
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the entries that a mask removes to zero: exactly +0, also where they are infinite or NaN.

    Kept entries stay as they are, bit for bit. On CPU the bits of the weights are multiplied by 0 or 1 as integers, in
    chunks: that is as fast as multiplying by a mask of floats, which would need four times the memory, and four times
    faster than what torch does with a boolean mask (benchmarks/overhead.py).

    Args:
        tensors: floating-point, of any shape, strides and device.
        masks: boolean, one for each tensor, of its shape and on its device.

    Example:
        >>> weight = torch.tensor([1.0, -2.0, float("nan")])
        >>> apply_masks_([weight], [torch.tensor([True, False, False])])
        >>> weight
        tensor([1., 0., 0.])
    """
    buffers: dict[torch.dtype, Tensor] = {}
    for tensor, mask in zip(tensors, masks, strict=True):
        if tensor.device.type == "cpu" and tensor.is_contiguous() and mask.is_contiguous():
            integer = INTEGERS[tensor.element_size()]
            buffer = buffers.setdefault(integer, torch.empty(CHUNK, dtype=integer))
            _multiply_bits_(tensor.view(-1).view(integer), mask.view(-1).view(torch.uint8), buffer)
        else:
            torch.where(mask, tensor, tensor.new_zeros(()), out=tensor)


def _multiply_bits_(bits: Tensor, mask: Tensor, buffer: Tensor) -> None:
    for some_bits, some_mask in zip(torch.split(bits, CHUNK), torch.split(mask, CHUNK), strict=True):
        factor = buffer[: some_mask.numel()]
        factor.copy_(some_mask)
        some_bits.mul_(factor)
