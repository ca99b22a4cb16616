"""Masks applied to weights, in place, after every optimizer step: the one part of pruning that is always paid for."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.core.packing import INTEGERS
from lightning_prune.core.types import Masks, Name
from lightning_prune.model.fused import is_on_gpu, mask_on_gpu_
from lightning_prune.model.shards import local

CHUNK = 1 << 19  # weights masked at a time on CPU: their part of the mask, widened, stays in the cache


@torch.no_grad()
def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the entries that a mask removes to zero: exactly +0, also where they are infinite or NaN.

    Kept entries stay as they are, bit for bit. On CPU the bits of the weights are multiplied by 0 or 1 as integers, in
    chunks: much faster than what torch does with a boolean mask, and somewhat slower than with a mask of floats, which
    would need four times the memory (benchmarks/README.md). On a GPU one kernel writes the zeros of many tensors.

    Args:
        tensors: floating-point, of any shape, strides and device, DTensors as well.
        masks: boolean, one for each tensor, of its shape and on its device.

    Raises:
        ValueError: a mask is not boolean or not of its tensor's shape; some of the others may be masked by then.

    Example:
        >>> weight = torch.tensor([1.0, -2.0, float("nan")])
        >>> apply_masks_([weight], [torch.tensor([True, False, False])])
        >>> weight
        tensor([1., 0., 0.])
    """
    on_gpu: list[tuple[Tensor, Tensor]] = []
    for tensor, mask in zip(tensors, masks, strict=True):
        if mask.dtype != torch.bool or mask.shape != tensor.shape:
            raise ValueError(
                f"`masks` are boolean and of their tensors' shapes, but got {mask.dtype} of shape {tuple(mask.shape)} "
                f"for a tensor of shape {tuple(tensor.shape)}."
            )
        if _is_plain(tensor):
            integer = INTEGERS[tensor.element_size()]
            _multiply_bits_(tensor.view(integer), mask.view(torch.uint8))
        elif is_on_gpu(tensor, mask):
            on_gpu.append((tensor, mask))
        else:
            tensor.masked_fill_(mask.logical_not(), 0.0)
    if on_gpu:
        mask_on_gpu_(*zip(*on_gpu, strict=True))


class Masked:
    """What has parameters and masks of some of them, and can apply these."""

    targets: dict[Name, nn.Parameter]
    masks: Masks

    @torch.no_grad()
    def apply_(self, among: Container[int] | None = None) -> None:
        """Set the pruned weights to zero, of all targets or of those whose ids are `among` the given ones."""
        names = [name for name in self.masks if among is None or id(self.targets[name]) in among]
        apply_masks_([local(self.targets[name]) for name in names], [self.masks[name] for name in names])

    @torch.no_grad()
    def apply_to_(self, model: nn.Module) -> None:
        """Set the pruned weights of a copy of the model to zero, wherever the copy lies."""
        copies = dict(model.named_parameters())
        weights = [local(copies[name]) for name in self.masks]
        apply_masks_(weights, [m.to(w.device) for m, w in zip(self.masks.values(), weights, strict=True)])


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether the bits of a tensor lie here, as those of one on an accelerator or of a DTensor do not."""
    return tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter)


def _multiply_bits_(bits: Tensor, mask: Tensor) -> None:
    if bits.numel() <= CHUNK:
        bits.mul_(mask)  # torch widens the mask as it goes
        return
    length = max(1, CHUNK * len(bits) // bits.numel())  # along the first dim: any strides will do
    for some_bits, some_mask in zip(torch.split(bits, length), torch.split(mask, length), strict=True):
        some_bits.mul_(some_mask)
