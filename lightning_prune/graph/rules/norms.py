"""Normalisations: channels keep their places; what statistics run over is noted."""

from __future__ import annotations

from lightning_prune.graph.refinement import unify
from lightning_prune.graph.rules.products import GROUPED
from lightning_prune.graph.rules.table import Op, Types, freeze_all, rule
from lightning_prune.graph.types import Type, annotate, find, freeze, product

RENORMALISED = "renormalised"
"""The note on dims that a mean or a variance runs over: it is that of the surviving indices afterwards."""


@rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm"),
    *("_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "_batch_norm_impl_index"),
    *("native_batch_norm_legit_functional", "_native_batch_norm_legit_functional", "miopen_batch_norm"),
)
def batch_norm(op: Op) -> Types:
    """Unify the channels with scale, shift and running statistics."""
    for position in range(1, 5):
        vector = op[position] if len(op.args) > position else None
        if vector is not None and len(vector) == 1:
            unify(op.first[1], vector[0])
    return op.first


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(op: Op) -> Types:
    """Unify the last dims with scale and shift."""
    normalised = op.first[len(op.first) - len(op.args[1]) :]
    for position in (2, 3):
        vector = op[position] if len(op.args) > position else None
        if vector is not None:
            for a, b in zip(normalised, vector, strict=True):
                unify(a, b)
    for node in normalised:
        annotate(node, RENORMALISED)
    return op.first


@rule("native_group_norm")
def group_norm(op: Op) -> Types:
    """Split the channels into groups, and unify them with scale and shift."""
    channels, num_groups = op.first[1], op.args[6]
    for position in (1, 2):
        vector = op[position]
        if vector is not None:
            unify(channels, vector[0])
    if num_groups > 1:
        groups = Type(num_groups)
        annotate(groups, GROUPED)
        unify(channels, product([groups, Type(find(channels).size // num_groups)]))
    annotate(channels, RENORMALISED)
    return op.first


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(op: Op) -> Types:
    """Freeze direction and gain: a row that is masked in training would be divided by its norm of zero."""
    gain = op[1]
    assert gain is not None
    freeze_all([*op.first, *gain], "weight norm divides by the norm of each row")
    return op.first


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "logsumexp")
def softmax(op: Op) -> Types:
    """Freeze the dim that competes: an index that is zero would still take part."""
    dims = op.dims(1)
    for d in dims:
        freeze(op.first[d], "softmax runs over it")
    if op.name == "logsumexp":
        keeps = len(op.shape) == len(op.first)
        return [
            Type(1, "of size 1") if d in dims else node
            for d, node in enumerate(op.first)
            if keeps or d not in dims
        ]
    return op.first
