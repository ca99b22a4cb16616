"""Masks of many weights on a GPU, applied by one kernel: a launch for each tensor would cost more than the masking."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lightning_prune.model.fused_kernel import BLOCK

Piece = tuple[int, int, int]
"""Where the weights lie, where their mask lies, and how many they are."""


def is_fusible(tensor: Tensor, mask: Tensor) -> bool:
    """Tell whether `zero_pruned_` takes a tensor and its mask: plain memory, row-major, on one GPU, with Triton."""
    return (
        tensor.is_cuda
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_contiguous()
        and mask.is_contiguous()
        and mask.device == tensor.device
        and _works(tensor.device)
        and not torch.compiler.is_compiling()
    )


@torch.no_grad()
def zero_pruned_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the entries that masks remove to zero, by one kernel for each device and size of entry.

    The kernel is given a table of addresses, which is kept as long as the same tensors come. It reads the masks and
    writes the zeros, and reads no weight. Nothing waits for the device.

    Args:
        tensors: as `is_fusible` takes them.
        masks: boolean, of their shapes.
    """
    from lightning_prune.model.fused_kernel import launch

    alike: dict[tuple[torch.device, int], list[Piece]] = {}
    for tensor, mask in zip(tensors, masks, strict=True):
        piece = tensor.data_ptr(), mask.data_ptr(), tensor.numel()
        alike.setdefault((tensor.device, tensor.element_size()), []).append(piece)
    for (device, num_bytes), pieces in alike.items():
        table = table_of(tuple(pieces), num_bytes, device)
        if len(table):
            with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
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
        rows.append(
            torch.stack([weight + starts * num_bytes, mask + starts, (numel - starts).clamp(max=BLOCK)], 1)
        )
    table = torch.cat(rows)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


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
