"""Operations that make tensors from sizes."""

from __future__ import annotations

from lightning_prune.graph.rules.table import Op, Types, freeze_all, frozen, rule
from lightning_prune.graph.types import Type


@rule(
    *("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"),
    *("empty_strided", "new_empty_strided", "efficientzerotensor"),
)
def uniform(op: Op) -> Types:
    """All indices are the same, so any of them can go, if the size in the code follows."""
    return [Type(size) for size in op.shape]


@rule(
    "arange",
    "linspace",
    "logspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "tril_indices",
    "triu_indices",
)
def positions(op: Op) -> Types:
    """Each index has a meaning of its own."""
    return frozen(op.shape, f"made by {op.name}")


@rule("tril", "triu", "diagonal", "diag_embed", "diag")
def diagonals(op: Op) -> Types:
    """The last two dims are positions, like those before them in a diagonal."""
    freeze_all(op.first, f"positions for {op.name}")
    return op.first if op.name in ("tril", "triu") else frozen(op.shape, f"made by {op.name}")
