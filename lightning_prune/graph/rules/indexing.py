"""Operations that read or write at computed positions: the dims they do it along stay whole."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.graph.refinement import unify
from lightning_prune.graph.rules.pointwise import broadcast
from lightning_prune.graph.rules.table import Op, Types, freeze_all, frozen, rule
from lightning_prune.graph.types import find, freeze

REASON = "indexed by a tensor"


@rule("embedding")
def embedding(op: Op) -> Types:
    """Look up rows: the vocabulary stays, the width goes along."""
    indices = op[1]
    assert indices is not None
    freeze(op.first[0], "vocabulary of an embedding")
    return [*indices, op.first[1]]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(op: Op) -> list[Types]:
    """Look up rows and reduce them by bags: the vocabulary stays, the width goes along."""
    freeze(op.first[0], "vocabulary of an embedding")
    return [[*frozen(op.shape[:1], "bags of an embedding"), op.first[1]]]


@rule("index", "_unsafe_index")
def index(op: Op) -> Types:
    """Read at positions given by tensors; the dims without such a tensor go along."""
    types, used = op.first, _indexed(op)
    if used is None:
        return frozen(op.shape, REASON)
    num_new = len(op.shape) - (len(types) - len(used))
    new = frozen(op.shape[used[0] : used[0] + num_new], REASON)
    return [*types[: used[0]], *new, *types[used[-1] + 1 :]]


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(op: Op) -> Types:
    """Write at positions given by tensors; the dims without such a tensor are those of what is written."""
    types, values, used = op.first, op[2], _indexed(op)
    assert values is not None
    if used is None:
        freeze_all(values, REASON)
        return types
    num_new = max(1 if _is_mask(t) else t.dim() for t in op.args[1] if t is not None)
    num_behind = len(types) - used[-1] - 1
    first = (
        len(values) - num_behind - num_new
    )  # of the dims that lie where the positions are, counted from the front
    freeze_all(values[max(first, 0) : max(len(values) - num_behind, 0)], REASON)
    broadcast([types[used[-1] + 1 :], values[max(len(values) - num_behind, 0) :]])
    broadcast([types[: used[0]], values[: max(first, 0)]])
    return types


def _indexed(op: Op) -> list[int] | None:
    """Freeze the dims that positions or masks are given for, and return them; None, with all frozen, where apart."""
    used: list[int] = []
    d = 0
    for given in op.args[1]:
        num = 1 if given is None or not _is_mask(given) else given.dim()
        if given is not None:
            used += range(d, d + num)
            freeze_all(op.types(given), REASON)
        d += num
    freeze_all([op.first[d] for d in used], REASON)
    if used and used == list(range(used[0], used[-1] + 1)):
        return used
    freeze_all(op.first, REASON)
    return None


def _is_mask(given: Tensor) -> bool:
    return given.dtype in (torch.bool, torch.uint8)


@rule("gather")
def gather(op: Op) -> Types:
    """Read one dim at positions that differ along the others, which go along."""
    positions = op[2]
    assert positions is not None
    return _aligned(op.dim(1), op.first, positions)[1]


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce", "index_fill")
def scatter(op: Op) -> Types:
    """Write along one dim at given positions; the others are those of what is written."""
    positions, values = op[2], op[3]
    assert positions is not None
    by_entry = op.name.startswith("scatter")
    freeze_all(positions if not by_entry else [], REASON)
    _aligned(op.dim(1), op.first, *(t for t in (positions if by_entry else None, values) if t))
    return op.first


def _aligned(dim: int, *all_types: Types) -> tuple[Types, ...]:
    """Freeze one dim of all, and unify the others; where their sizes differ, these stay whole, too."""
    for d, column in enumerate(zip(*all_types, strict=True)):
        if d == dim or len({find(node).size for node in column}) > 1:
            freeze_all(list(column), REASON)
        else:
            for node in column[1:]:
                unify(column[0], node)
    return all_types


@rule("masked_scatter")
def masked_scatter(op: Op) -> Types:
    """Write rows one after the other where a mask is set; their width goes along where the mask is alike along it.

    So features of images come among the embeddings of words.
    """
    into, mask, source = op.args[:3]
    types = [found for found in (op.first, op[1], op[2]) if found]
    is_alike = mask.dim() > 0 and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
    is_by_rows = is_alike and into.shape == op.shape and source.shape[-1:] == into.shape[-1:] != ()
    for found in types:
        freeze_all(found[:-1] if is_by_rows else found, REASON)
    for found in types[1:] if is_by_rows else []:
        if find(found[-1]).size > 1:
            unify(op.first[-1], found[-1])
    return op.first if into.shape == op.shape else frozen(op.shape, REASON)


@rule("index_select")
def index_select(op: Op) -> Types:
    """Read one dim at given positions."""
    d = op.dim(1)
    freeze(op.first[d], REASON)
    return [*op.first[:d], *frozen([op.shape[d]], REASON), *op.first[d + 1 :]]


@rule("_pack_padded_sequence")
def pack_padded_sequence(op: Op) -> list[Types]:
    """Put the steps of sequences of unlike lengths behind each other; the dims after the first two go along."""
    reason = "packed as sequences"
    freeze_all(op.first[:2], reason)
    data, lengths = op.output
    return [[*frozen(data.shape[:1], reason), *op.first[2:]], frozen(lengths.shape, reason)]
