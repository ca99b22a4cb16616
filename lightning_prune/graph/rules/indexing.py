"""Operations that read at computed positions: the dims they read along stay whole."""

from __future__ import annotations

import torch

from lightning_prune.graph.rules.table import Op, Types, freeze_all, frozen, rule
from lightning_prune.graph.types import freeze


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
    types, given = op.first, op.args[1]
    used = [d for d, tensor in enumerate(given) if tensor is not None]
    reason = "indexed by a tensor"
    freeze_all([types[d] for d in used], reason)
    is_contiguous = bool(used) and used == list(range(used[0], used[-1] + 1))
    if not is_contiguous or any(given[d].dtype in (torch.bool, torch.uint8) for d in used):
        freeze_all(types, reason)
        return frozen(op.shape, reason)
    num_new = len(op.shape) - (len(types) - len(used))
    new = frozen(op.shape[used[0] : used[0] + num_new], reason)
    return [*types[: used[0]], *new, *types[used[-1] + 1 :]]


@rule("index_select")
def index_select(op: Op) -> Types:
    """Read one dim at given positions."""
    d = op.dim(1)
    freeze(op.first[d], "indexed by a tensor")
    return [*op.first[:d], *frozen([op.shape[d]], "indexed by a tensor"), *op.first[d + 1 :]]


@rule("_pack_padded_sequence")
def pack_padded_sequence(op: Op) -> list[Types]:
    """Put the steps of sequences of unlike lengths behind each other; the dims after the first two go along."""
    reason = "packed as sequences"
    freeze_all(op.first[:2], reason)
    data, lengths = op.output
    return [[*frozen(data.shape[:1], reason), *op.first[2:]], frozen(lengths.shape, reason)]
