"""Matrix products and convolutions: they unify the contracted dim and carry the others."""

from __future__ import annotations

from lightning_prune.graph.refinement import unify
from lightning_prune.graph.rules.pointwise import broadcast
from lightning_prune.graph.rules.table import Op, Types, freeze_all, frozen, rule
from lightning_prune.graph.types import Type, annotate, find, freeze, frozen_type, product

BATCHED = "batched"
"""The note on dims that batched products run over: attention heads."""
GROUPED = "grouped"
"""The note on the groups of a grouped convolution or normalisation."""


def contract(op: Op, left: Types, right: Types, num_batch: int = 0) -> Types:
    """Multiply (..., m, k) by (..., k, n)."""
    batch = []
    for a, b in zip(left[:num_batch], right[:num_batch], strict=True):
        unify(a, b)
        batch.append(a if find(a).size != 1 else b)
        annotate(batch[-1], BATCHED)
    unify(left[-1], right[-2])
    result = [*batch, left[-2], right[-1]]
    op.macs.append([*result, left[-1]])
    return result


def _operand(op: Op, position: int) -> Types:
    types = op[position]
    assert types is not None, op.name
    return types


@rule("mm", "matmul")
def mm(op: Op) -> Types | None:
    """Multiply two matrices."""
    left, right = op.first, _operand(op, 1)
    return contract(op, left, right) if len(left) == len(right) == 2 else None


@rule("addmm", "_addmm_activation")
def addmm(op: Op) -> Types:
    """Multiply two matrices and add a third tensor."""
    result = contract(op, _operand(op, 1), _operand(op, 2))
    broadcast([result, op.first])
    return result


@rule("bmm")
def bmm(op: Op) -> Types:
    """Multiply two batches of matrices."""
    return contract(op, op.first, _operand(op, 1), 1)


@rule("baddbmm")
def baddbmm(op: Op) -> Types:
    """Multiply two batches of matrices and add a third tensor."""
    result = contract(op, _operand(op, 1), _operand(op, 2), 1)
    broadcast([result, op.first])
    return result


@rule("_grouped_mm")
def grouped_mm(op: Op) -> Types | None:
    """Multiply rows (tokens, k), sorted by expert, each by its expert's matrix of (experts, k, n)."""
    left, right = op.first, _operand(op, 1)
    if len(left) != 2 or len(right) != 3:
        return None
    freeze(right[0], "experts that rows are sorted by")
    unify(left[1], right[1])
    op.macs.append([*left, right[2]])
    return [left[0], right[2]]


@rule("mv")
def mv(op: Op) -> Types:
    """Multiply a matrix by a vector."""
    unify(op.first[1], _operand(op, 1)[0])
    op.macs.append(op.first)
    return op.first[:1]


@rule("dot", "vdot")
def dot(op: Op) -> Types:
    """Multiply two vectors."""
    unify(op.first[0], _operand(op, 1)[0])
    op.macs.append(op.first)
    return []


@rule("convolution", "_convolution")
def convolution(op: Op) -> Types:
    """Contract channels under a kernel, in groups or all together, forwards or transposed."""
    x, weight, bias = op.first, _operand(op, 1), op[2]
    is_transposed, num_groups = op.args[6], op.args[8]
    freeze_all(x[2:], "slid over by a convolution")
    freeze_all(weight[2:], "kernel of a convolution")
    groups = Type(num_groups) if num_groups > 1 else frozen_type(1, "of size 1")
    annotate(groups, GROUPED)
    per_group, whole = weight[1], weight[0]
    merged = product([groups, per_group])
    inputs, outputs = (whole, merged) if is_transposed else (merged, whole)
    unify(x[1], inputs)
    if num_groups > 1:
        unify(whole, product([groups, Type(find(whole).size // num_groups)]))
    if bias is not None:
        unify(outputs, bias[0])
    spatial = frozen(op.shape[2:], "slid over by a convolution")
    # each output position (of each input position, when transposed) reads the channels of its group
    positions = x[2:] if is_transposed else spatial
    op.macs.append([x[0], whole, per_group, *weight[2:], *positions])
    return [x[0], outputs, *spatial]
