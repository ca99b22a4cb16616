"""Attention in one operation, where it is not taken apart into products."""

from __future__ import annotations

from lightning_prune.graph.refinement import unify
from lightning_prune.graph.rules.products import BATCHED
from lightning_prune.graph.rules.table import Op, Types, freeze_all, rule
from lightning_prune.graph.types import annotate, find, frozen_type, product

_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")


@rule("scaled_dot_product_attention", *(f"_scaled_dot_product_{kernel}" for kernel in _KERNELS))
def attention(op: Op) -> list[Types]:
    """Unify heads and widths of query (..., q, d) and key (..., k, d); the value (..., k, v) gives the output."""
    query, key, value = op.first, op[1], op[2]
    assert key is not None and value is not None
    for a, b in zip(key[:-1], value[:-1], strict=True):
        unify(a, b)
    unify(query[-1], key[-1])
    freeze_all(key[-2:-1], "softmax runs over it")
    for a, b in zip(query[:-2], key[:-2], strict=True):
        repeats = find(a).size // max(find(b).size, 1)
        unify(a, b if repeats == 1 else product([b, frozen_type(repeats, "queries that share a key")]))
        annotate(a, BATCHED)
    op.macs += [[*query, key[-2]], [*query[:-1], *value[-2:]]]
    return [[*query[:-1], value[-1]]]
