"""Operations that concatenate, cut and repeat: sums, and pieces of them."""

from __future__ import annotations

from lightning_prune.graph.refinement import ConflictError, cut, split_product, unify
from lightning_prune.graph.rules.table import Op, Types, frozen, rule
from lightning_prune.graph.types import Type, concatenation, find, freeze, frozen_type, is_frozen, product


@rule("cat", "concat", "concatenate")
def cat(op: Op) -> Types:
    """Sum up one dim and unify the others."""
    tensors = [t for t in op.args[0] if t.dim() != 1 or t.shape[0]]
    all_types = [op.types(t) for t in tensors]
    num = len(all_types[0])
    d = int(op.argument(1, "dim", 0)) % num
    for types in all_types[1:]:
        for i in range(num):
            if i != d:
                unify(all_types[0][i], types[i])
    joined = list(all_types[0])
    joined[d] = concatenation(types[d] for types in all_types)
    return joined


@rule("stack")
def stack(op: Op) -> Types:
    """Unify all dims and insert one."""
    all_types = [op.types(t) for t in op.args[0]]
    d = int(op.argument(1, "dim", 0)) % (len(all_types[0]) + 1)
    for types in all_types[1:]:
        for first, other in zip(all_types[0], types, strict=True):
            unify(first, other)
    return [*all_types[0][:d], frozen_type(len(all_types), "stack"), *all_types[0][d:]]


@rule(
    *("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"),
    *("split_copy", "split_with_sizes_copy"),
)
def split(op: Op) -> list[Types]:
    """Cut one dim at the boundaries."""
    d, types = op.dim(2), op.first
    sizes = [piece.shape[d] for piece in op.output]
    pieces, rest = [], types[d]
    try:
        for size in sizes:
            piece, rest = cut(rest, size)
            pieces.append(piece)
    except ConflictError as conflict:
        freeze(types[d], f"split: {conflict}")
        pieces = frozen(sizes, f"split: {conflict}")
    return [[*types[:d], piece, *types[d + 1 :]] for piece in pieces]


@rule("unbind", "unbind_copy")
def unbind(op: Op) -> list[Types]:
    """Take a dim apart, which must stay whole."""
    d = op.dim(1)
    freeze(op.first[d], "taken apart by unbind")
    return [[*op.first[:d], *op.first[d + 1 :]] for _ in op.output]


@rule("select", "select_copy")
def select(op: Op) -> Types:
    """Pick one index of a dim, which must stay whole."""
    d = op.dim(1)
    freeze(op.first[d], "indexed by a number")
    return [*op.first[:d], *op.first[d + 1 :]]


@rule("slice", "narrow", "slice_copy", "narrow_copy")
def slice_(op: Op) -> Types:
    """Take a part of one dim."""
    d, types, size = op.dim(1), op.first, op.shape
    old = find(types[d]).size
    start, step = op.argument(2, "start") or 0, op.argument(4, "step") or 1
    start = max(0, start + old) if start < 0 else start
    if size[d] == old:
        return types
    return [*types[:d], _part(types[d], start, step, size[d]), *types[d + 1 :]]


def _part(node: Type, start: int, step: int, size: int) -> Type:
    if is_frozen(node):
        return frozen_type(size, "part of a frozen dim")
    try:
        if step != 1:
            return _strided(node, start, step, size)
        return cut(cut(node, start)[1], size)[0]
    except ConflictError as conflict:
        freeze(node, f"slice: {conflict}")
        return frozen_type(size, f"slice: {conflict}")


def _strided(node: Type, start: int, step: int, size: int) -> Type:
    """Take every `step`-th index, as `x[..., ::2]` does: the outer factor, of which the inner one stays whole."""
    if start >= step or size * step != find(node).size:
        raise ConflictError(f"a stride of {step} from {start} does not divide {find(node).size}")
    outer, inner = split_product(node, size)
    freeze(inner, "taken apart by a strided slice")
    return outer


@rule("slice_scatter", "select_scatter")
def scatter_slice(op: Op) -> Types:
    """Put a part in place: the dim stays whole."""
    d = op.dim(2)
    freeze(op.first[d], "overwritten in part")
    part = op[1]
    assert part is not None
    rest = part if len(part) == len(op.first) else [*part[:d], op.first[d], *part[d:]]
    for i, (a, b) in enumerate(zip(op.first, rest, strict=True)):
        if i != d:
            unify(a, b)
    return op.first


@rule("repeat", "repeat_copy")
def repeat(op: Op) -> Types:
    """Repeat dims as wholes: the repetitions are a new outer factor."""
    times = list(op.args[1])
    padded = [frozen_type(1, "of size 1")] * (len(times) - len(op.first)) + op.first
    return [node if n == 1 else product([Type(n), node]) for node, n in zip(padded, times, strict=True)]


@rule("flip", "roll")
def rearrange(op: Op) -> Types:
    """Move indices within dims, which must stay whole."""
    dims = op.dims(1, "dims") if op.name == "flip" else op.dims(2, "dims")
    for d in dims:
        freeze(op.first[d], f"rearranged by {op.name}")
    return op.first


@rule("constant_pad_nd")
def pad(op: Op) -> Types:
    """Put frozen indices before and behind."""
    widths, types, shape = list(op.args[1]), list(op.first), op.shape
    for k in range(len(widths) // 2):
        d, before, after = len(types) - 1 - k, widths[2 * k], widths[2 * k + 1]
        if before < 0 or after < 0:
            freeze(types[d], "cropped")
            types[d] = frozen_type(shape[d], "cropped")
        elif before or after:
            types[d] = concatenation(
                [frozen_type(before, "padding"), types[d], frozen_type(after, "padding")]
            )
    return types
