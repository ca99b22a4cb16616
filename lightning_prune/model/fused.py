"""Masks of many weights on a GPU, applied by few launches, which cost the processor more than they cost the GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lightning_prune.core.packing import INTEGERS

BLOCK = 4096  # weights of one program of the kernel
Piece = tuple[int, int, int]
"""Where the weights lie, where their mask lies, and how many they are."""


def is_on_gpu(tensor: Tensor, mask: Tensor) -> bool:
    """Tell whether `mask_on_gpu_` takes a tensor and its mask: plain memory of one GPU."""
    return (
        tensor.is_cuda and type(tensor) in (Tensor, nn.Parameter) and mask.get_device() == tensor.get_device()
    )


def mask_on_gpu_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the entries that masks remove to zero; nothing waits for the device.

    Contiguous tensors take one kernel of ours, where Triton is installed, as it comes with torch for CUDA; others are
    multiplied by 0 or 1 as integers, one after the other.

    Args:
        tensors: as `is_on_gpu` takes them, of any strides.
        masks: boolean, of their shapes.
    """
    is_recorded = torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
    if is_recorded or not _works(tensors[0].device):  # what is recorded outlives a table of addresses
        rest = list(zip(tensors, masks, strict=True))
    else:
        rest = zero_pruned_(tensors, masks)
    if rest:
        bits = [tensor.view(INTEGERS[tensor.element_size()]) for tensor, _ in rest]
        torch._foreach_mul_(bits, [mask.view(torch.uint8) for _, mask in rest])


def zero_pruned_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Do so by one kernel for each device and size of entry, and return the tensors that it cannot take, with masks.

    The kernel is given a table of addresses, which is kept as long as the same tensors come. It reads the masks and
    writes the zeros, and reads no weight.
    """
    alike: dict[tuple[int, int], list[Piece]] = {}
    rest: list[tuple[Tensor, Tensor]] = []
    done: list[Tensor] = []
    for tensor, mask in zip(tensors, masks, strict=True):
        if tensor.is_contiguous() and mask.is_contiguous():
            piece = tensor.data_ptr(), mask.data_ptr(), tensor.numel()
            alike.setdefault((tensor.get_device(), tensor.element_size()), []).append(piece)
            done.append(tensor)
        else:
            rest.append((tensor, mask))
    for (device, num_bytes), pieces in alike.items():
        is_current = device < 0 or device == torch.cuda.current_device()
        with nullcontext() if is_current else torch.cuda.device(device):
            stream = 0 if device < 0 else torch.cuda.current_stream().cuda_stream
            table = table_of(tuple(pieces), num_bytes, device, stream)
            if len(table):
                _launch()(table, num_bytes)
    torch.autograd.graph.increment_version(done)
    return rest


@lru_cache(maxsize=8)
def table_of(pieces: tuple[Piece, ...], num_bytes: int, device: int, stream: int = 0) -> Tensor:
    """Return where the parts of `BLOCK` weights lie, where their masks lie, and how many they are, (parts, 3) int64.

    A table says nothing but what its arguments say, so one that is kept cannot become wrong. It is copied to the device
    on the stream that is current, and is for kernels on this stream. The device is the number of a GPU, -1 is the CPU.

    Example:
        >>> table_of(((1000, 90000, 5000),), 2, -1)
        tensor([[ 1000, 90000,  4096],
                [ 9192, 94096,   904]])
    """
    rows = [torch.empty(0, 3, dtype=torch.int64, device="cpu")]
    for weight, mask, numel in pieces:
        starts = torch.arange(0, numel, BLOCK, device="cpu")
        lengths = (numel - starts).clamp(max=BLOCK)
        rows.append(torch.stack([weight + starts * num_bytes, mask + starts, lengths], 1))
    table = torch.cat(rows)
    return table if device < 0 else table.pin_memory().to(torch.device("cuda", device), non_blocking=True)


@cache
def _launch() -> Callable[[Tensor, int], None]:
    """Return what starts the kernel; nothing else here asks for Triton."""
    from lightning_prune.model.fused_kernel import launch

    return launch


@cache
def _works(device: torch.device) -> bool:
    """Whether the kernel can be compiled and run there, tried once: Triton wants a compiler of C.

    Triton's interpreter runs on the CPU, and could not read what addresses of a GPU point to.
    """
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") != "0":
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
