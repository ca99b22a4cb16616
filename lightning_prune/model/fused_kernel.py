"""The kernel of `fused`, in Triton's language; without Triton there is none."""

from importlib.util import find_spec

from torch import Tensor

BLOCK = 4096  # weights of one program
INTEGERS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}
"""Triton's name of the integer of as many bytes."""

if find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def zero_pruned(table, integer: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """Write zeros where the mask is False: row i of the table has two addresses and a length, for program i."""
        row = table + 3 * tl.program_id(0)
        weight = tl.load(row).to(tl.pointer_type(integer))
        mask = tl.load(row + 1).to(tl.pointer_type(tl.int8))
        length = tl.load(row + 2)
        at = tl.arange(0, block)
        kept = tl.load(mask + at, mask=at < length, other=1)
        tl.store(weight + at, tl.zeros((block,), integer), mask=kept == 0)

    def launch(table: Tensor, num_bytes: int) -> None:
        """Start the kernel for a table (programs, 3) int64 and weights of so many bytes."""
        integer = getattr(tl, INTEGERS[num_bytes])
        zero_pruned[(len(table),)](table, integer=integer, block=BLOCK, num_warps=4)
