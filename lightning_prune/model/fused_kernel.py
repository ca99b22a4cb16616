"""The kernels of `fused`, in Triton's language; without Triton there are none."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lightning_prune.model.fused import BLOCK

if find_spec("triton"):
    import triton
    import triton.language as tl

    LENGTH = tl.constexpr(BLOCK)

    @triton.jit  # type: ignore[untyped-decorator]
    def _zero_pruned(table, integer: tl.constexpr):  # type: ignore[no-untyped-def]
        """Write zeros where the mask is False: row i of the table has two addresses and a length, for program i."""
        row = table + 3 * tl.program_id(0)
        weight = tl.load(row).to(tl.pointer_type(integer))
        mask = tl.load(row + 1).to(tl.pointer_type(tl.int8))
        length = tl.load(row + 2)
        at = tl.arange(0, LENGTH)
        kept = tl.load(mask + at, mask=at < length, other=1)
        tl.store(weight + at, tl.zeros((LENGTH,), integer), mask=kept == 0)

    @triton.jit
    def _zero_pruned_8(table):  # type: ignore[no-untyped-def]
        _zero_pruned(table, tl.int8)

    @triton.jit
    def _zero_pruned_16(table):  # type: ignore[no-untyped-def]
        _zero_pruned(table, tl.int16)

    @triton.jit
    def _zero_pruned_32(table):  # type: ignore[no-untyped-def]
        _zero_pruned(table, tl.int32)

    @triton.jit
    def _zero_pruned_64(table):  # type: ignore[no-untyped-def]
        _zero_pruned(table, tl.int64)

    KERNELS = {1: _zero_pruned_8, 2: _zero_pruned_16, 4: _zero_pruned_32, 8: _zero_pruned_64}
    """By the bytes of a weight; none has an argument but the table, so that a compiled one can be started by itself."""


def launch(table: Tensor, num_bytes: int) -> None:
    """Start the kernel for a table (programs, 3) int64 of this device and weights of so many bytes."""
    started = compiled(num_bytes, table.get_device())
    (started or KERNELS[num_bytes])[(len(table), 1, 1)](table)


@cache
def compiled(num_bytes: int, device: int) -> Any:
    """Return the compiled kernel, whose start costs a fraction of what finding it anew costs; None if interpreted.

    The device is the number of a GPU, -1 is the CPU.
    """
    nothing = torch.zeros(
        1, 3, dtype=torch.int64, device="cpu" if device < 0 else torch.device("cuda", device)
    )
    kernel: Callable[..., Any] = KERNELS[num_bytes][(1, 1, 1)]
    return kernel(nothing)
