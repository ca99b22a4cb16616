"""Operations that reduce dims."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.graph.rules.norms import RENORMALISED
from lightning_prune.graph.rules.table import Op, Types, frozen, rule
from lightning_prune.graph.types import annotate, freeze, frozen_type

NEUTRAL = ("sum", "nansum", "linalg_vector_norm", "norm")
"""Zeros change nothing here."""
MEANS = ("mean", "var", "std", "var_mean", "std_mean")


@rule(
    *(*NEUTRAL, *MEANS, "amax", "amin", "aminmax", "max", "min", "argmax", "argmin", "any", "all", "prod"),
    *("median", "mode", "count_nonzero"),
)
def reduce(op: Op) -> Types | list[Types] | None:
    """Take the reduced dims away; those that zeros would change are frozen."""
    if any(isinstance(other, Tensor) for other in op.args[1:]):
        return None
    types = op.first
    gone = op.dims(2 if op.name in ("linalg_vector_norm", "norm") else 1)
    for d in gone:
        if op.name in MEANS:
            annotate(types[d], RENORMALISED)
        elif op.name not in NEUTRAL:
            freeze(types[d], f"reduced by {op.name}")
    keeps_dims = len(op.shape) == len(types)
    result = [
        frozen_type(1, "of size 1") if d in gone else node
        for d, node in enumerate(types)
        if keeps_dims or d not in gone
    ]
    return result if isinstance(op.output, Tensor) else [result for _ in op.output]


@rule(
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "cummax",
    "cummin",
    "sort",
    "topk",
    "kthvalue",
    "_fft_r2c",
    "_fft_c2r",
    "_fft_c2c",
)
def along(op: Op) -> Types | list[Types]:
    """Freeze the dims that something runs along; the others stay."""
    position = 2 if op.name in ("topk", "kthvalue") or "stable" in str(op.func) else 1
    value = op.argument(position, "dim", -1)
    dims = (
        {d % len(op.first) for d in (value if isinstance(value, (list, tuple)) else [value])}
        if op.first
        else set()
    )
    for d in dims:
        freeze(op.first[d], f"{op.name} runs along it")
    new = frozen(op.shape, f"made by {op.name}")
    result = [new[d] if d in dims else node for d, node in enumerate(op.first)]
    return result if isinstance(op.output, Tensor) else [result for _ in op.output]
