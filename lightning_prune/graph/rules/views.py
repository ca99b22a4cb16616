"""Operations that only rearrange: views split and merge products."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune.graph.refinement import ConflictError, take
from lightning_prune.graph.rules.table import Op, Types, freeze_all, frozen, rule
from lightning_prune.graph.types import Type, factors, find, freeze, frozen_type, product


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "reshape_copy", "_reshape_copy", "view_copy")
def view(op: Op) -> Types:
    """Give each new dim the factors that it is made of."""
    return regroup(op.first, op.shape)


def regroup(types: Sequence[Type], sizes: Sequence[int]) -> Types:
    """Return the types of a tensor that is viewed with other sizes; where boundaries cross, both sides freeze."""
    result: Types = []
    old, new = list(types), list(sizes)
    while old or new:
        sources, targets = old[:1], new[:1]
        del old[:1], new[:1]
        before = find(sources[0]).size if sources else 1
        after = targets[0] if targets else 1
        while before != after:
            if before < after:
                sources.append(old.pop(0))
                before *= find(sources[-1]).size
            else:
                targets.append(new.pop(0))
                after *= targets[-1]
        result += _refactor(sources, targets)
    return result


def _refactor(sources: Types, sizes: Sequence[int]) -> Types:
    found = [factor for source in sources for factor in factors(source)]
    result = []
    try:
        for size in sizes:
            taken, found = take(found, size)
            result.append(product(taken))
    except ConflictError as conflict:
        freeze_all(sources, f"view: {conflict}")
        return frozen(sizes, f"view: {conflict}")
    return result


@rule("as_strided")
def as_strided(op: Op) -> Types | None:
    """Know only strides that change nothing."""
    return op.first if list(op.args[1]) == list(op.args[0].shape) else None


@rule("permute", "permute_copy")
def permute(op: Op) -> Types:
    """Reorder the dims."""
    return [op.first[d] for d in op.args[1]]


@rule("transpose", "swapaxes", "transpose_copy")
def transpose(op: Op) -> Types:
    """Exchange two dims."""
    types, a, b = list(op.first), op.dim(1, "dim0"), op.dim(2, "dim1")
    types[a], types[b] = types[b], types[a]
    return types


@rule("t", "numpy_T", "adjoint", "t_copy")
def reverse(op: Op) -> Types:
    """Turn the dims around."""
    return op.first[::-1]


@rule("unsqueeze", "unsqueeze_copy")
def unsqueeze(op: Op) -> Types:
    """Insert a dim of size 1."""
    d = op.dim(1, extra=1)
    return [*op.first[:d], frozen_type(1, "of size 1"), *op.first[d:]]


@rule("squeeze", "squeeze_copy")
def squeeze(op: Op) -> Types:
    """Take out dims of size 1."""
    gone = op.dims(1)
    return [node for d, node in enumerate(op.first) if d not in gone or find(node).size != 1]


@rule("expand", "broadcast_to", "expand_copy")
def expand(op: Op) -> Types:
    """Repeat along dims of size 1: all indices there are the same, so any of them can go."""
    shape, types = op.shape, op.first
    padded = [frozen_type(1, "of size 1")] * (len(shape) - len(types)) + types
    return [node if find(node).size == size else Type(size) for node, size in zip(padded, shape, strict=True)]


@rule("view_as_real", "view_as_real_copy")
def view_as_real(op: Op) -> Types:
    """Append a dim for the real and the imaginary part."""
    return [*op.first, frozen_type(2, "complex number")]


@rule("view_as_complex", "view_as_complex_copy")
def view_as_complex(op: Op) -> Types:
    """Take away the last dim, of real and imaginary part."""
    freeze(op.first[-1], "complex number")
    return op.first[:-1]
