"""Masks of many weights on a GPU, applied by few launches: each costs the processor more than the masking the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lightning_prune.core.packing import INTEGERS
from lightning_prune.model.fused_kernel import BLOCK, launch

FEW = 8  # tensors whose launches one by one, from torch's own loop, are cheaper than that of our kernel
Piece = tuple[int, int, int]
"""Where the weights lie, where their mask lies, and how many they are."""


def is_on_gpu(tensor: Tensor, mask: Tensor) -> bool:
    """Tell whether `mask_on_gpu_` takes a tensor and its mask: plain memory of one GPU."""
    return tensor.is_cuda and type(tensor) in (Tensor, nn.Parameter) and mask.device == tensor.device


@torch.no_grad()
def mask_on_gpu_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the entries that masks remove to zero; nothing waits for the device.

    Many tensors take one kernel of ours, where Triton is installed, as it comes with torch for CUDA, and they are
    contiguous; others are multiplied by 0 or 1 as integers, one after the other.

    Args:
        tensors: as `is_on_gpu` takes them, of any strides.
        masks: boolean, of their shapes.
    """
    if len(tensors) > FEW and _is_for_kernel(tensors, masks):
        zero_pruned_(tensors, masks)
        return
    bits = [tensor.view(INTEGERS[tensor.element_size()]) for tensor in tensors]
    torch._foreach_mul_(bits, [mask.view(torch.uint8) for mask in masks])


def zero_pruned_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Do so by one kernel for each device and size of entry.

    The kernel is given a table of addresses, which is kept as long as the same tensors come. It reads the masks and
    writes the zeros, and reads no weight.

    Args:
        tensors: contiguous.
        masks: the same.
    """
    alike: dict[tuple[torch.device, int], list[Piece]] = {}
    for tensor, mask in zip(tensors, masks, strict=True):
        piece = tensor.data_ptr(), mask.data_ptr(), tensor.numel()
        alike.setdefault((tensor.device, tensor.element_size()), []).append(piece)
    for (device, num_bytes), pieces in alike.items():
        table = table_of(tuple(pieces), num_bytes, device)
        if len(table):
            with torch.cuda.device_of(table):
                launch(table, num_bytes)
    torch.autograd.graph.increment_version(list(tensors))


@lru_cache(maxsize=64)
def table_of(pieces: tuple[Piece, ...], num_bytes: int, device: torch.device) -> Tensor:
    """Return where the parts of `BLOCK` weights lie, where their masks lie, and how many they are, (parts, 3) int64.

    A table says nothing but what its arguments say, so one that is kept cannot become wrong.

    Example:
        >>> table_of(((1000, 90000, 5000),), 2, torch.device("cpu"))
        tensor([[ 1000, 90000,  4096],
                [ 9192, 94096,   904]])
    """
    rows = [torch.empty(0, 3, dtype=torch.int64)]
    for weight, mask, numel in pieces:
        starts = torch.arange(0, numel, BLOCK)
        lengths = (numel - starts).clamp(max=BLOCK)
        rows.append(torch.stack([weight + starts * num_bytes, mask + starts, lengths], 1))
    table = torch.cat(rows)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _is_for_kernel(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
    return (
        all(
            tensor.is_contiguous() and mask.is_contiguous()
            for tensor, mask in zip(tensors, masks, strict=True)
        )
        and not torch.compiler.is_compiling()
        and _works(tensors[0].device)
    )


@cache
def _works(device: torch.device) -> bool:
    """Whether the kernel can be compiled and run there, tried once: Triton wants a compiler of C."""
    if find_spec("triton") is None:
        return False
    try:
        zero_pruned_([torch.ones(1, device=device)], [torch.zeros(1, dtype=torch.bool, device=device)])
    except Exception as error:  # of Triton, of a compiler or of a driver
        warnings.warn(
            f"Masks are applied tensor by tensor on {device}, since Triton's kernel did not run: {error!r:.200}.",
            stacklevel=2,
        )
        return False
    return True
