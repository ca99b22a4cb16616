"""From scores of weights to a choice among coupled groups."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.core.allocation import floor_of
from lightning_prune.core.granularities import Channel, Head
from lightning_prune.core.selection import keep_top
from lightning_prune.core.types import GroupScores, Name, Scope, Scores
from lightning_prune.graph import Couplings, Group
from lightning_prune.graph.projection import positions

Coupled = Channel | Head


def candidates(
    couplings: Couplings, granularity: Coupled, scored: Collection[Name], protected: Collection[Name]
) -> dict[str, Group]:
    """Return the groups that a granularity prunes: those with a scored weight, of which no protected one is written.

    Args:
        couplings: of the model.
        granularity: says which roles count.
        scored: parameters that have scores.
        protected: parameters whose outputs stay; what they read can go.
    """
    return {
        name: group
        for name, group in couplings.groups.items()
        if granularity.prunes(group.role)
        and any(member.tensor in scored for member in group.members)
        and not any(member.tensor in protected and member.dim == 0 for member in group.members)
    }


def score_groups(groups: Mapping[str, Group], scores: Scores, granularity: Coupled) -> GroupScores:
    """Reduce the scores of all coupled weights to one per index of each group.

    Args:
        groups: by name.
        scores: of weights; each tensor is read once.
        granularity: says how they are reduced and normalised.

    Returns:
        For each group a tensor (size,), higher is kept, with the groups' kinds.
    """
    start = -math.inf if granularity.reduction == "max" else 0.0
    total = {name: torch.full((group.size,), start, dtype=torch.float64) for name, group in groups.items()}
    count = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in groups.items()}
    for tensor, found in scores.items():
        here = [(n, m) for n, group in groups.items() for m in group.members if m.tensor == tensor]
        for name, member in here:
            along = _reduced(found, member.dim, granularity.reduction)
            index = positions(member.type, member.atom)
            is_member = index >= 0
            total[name] = _gathered(total[name], index[is_member], along[is_member], granularity.reduction)
            ones = torch.full(
                (int(is_member.sum()),), found.numel() / found.shape[member.dim], dtype=torch.float64
            )
            count[name].index_add_(0, index[is_member], ones)
    if granularity.reduction == "mean":
        total = {name: t / count[name].clamp_min(1) for name, t in total.items()}
    kinds = {name: group.kind for name, group in groups.items()}
    return GroupScores({n: _normalised(t, granularity.normalize) for n, t in total.items()}, kinds)


def _reduced(scores: Tensor, dim: int, reduction: str) -> Tensor:
    matrix = scores.detach().movedim(dim, 0).flatten(1).double().cpu()
    return matrix.amax(1) if reduction == "max" else matrix.sum(1)


def _gathered(total: Tensor, index: Tensor, values: Tensor, reduction: str) -> Tensor:
    if reduction == "max":
        return total.scatter_reduce(0, index, values, "amax")
    return total.index_add(0, index, values)


def _normalised(scores: Tensor, how: str) -> Tensor:
    if how == "none":
        return scores
    unit = scores.mean() if how == "mean" else scores.max()
    return scores / unit if float(unit) > 0 else scores


def choose(
    scores: GroupScores,
    sparsity: float,
    *,
    granularity: Coupled,
    scope: Scope,
    ties: Sequence[Sequence[str]] = (),
) -> dict[str, Tensor]:
    """Let the groups compete, and bring their numbers to sizes that are allowed.

    Args:
        scores: of each group, (size,).
        sparsity: fraction of all indices to remove, in [0, 1).
        granularity: says what numbers are a multiple of, and how many stay at least.
        scope: who competes with whom.
        ties: sets of groups that keep equally many.

    Returns:
        Group name -> bool (size,), True is kept.
    """
    if not scores:
        return {}
    counts = {name: int(mask.sum()) for name, mask in scope(scores, sparsity).items()}
    for tie in ties:
        here = [name for name in tie if name in counts]
        if here:
            counts |= dict.fromkeys(here, round(sum(counts[name] for name in here) / len(here)))
    return keep(scores, {n: allowed(c, len(scores[n]), granularity) for n, c in counts.items()})


def keep(scores: GroupScores, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Keep the best `counts` indices of each group; among equals the lower index."""
    return {name: keep_top({name: found}, counts[name])[name] for name, found in scores.items()}


def allowed(count: int, size: int, granularity: Coupled) -> int:
    """Return the allowed number that is nearest to `count`; of two that are, the larger.

    Example:
        >>> [allowed(n, 64, Channel()) for n in (1, 11, 12, 63)], allowed(5, 12, Channel())
        ([8, 8, 16, 64], 6)
    """
    step = granularity.step(size)
    low = max(floor_of(granularity.min_keep, size), 1)
    nearest = (count + step // 2) // step * step
    return min(size, max(nearest, -(-low // step) * step))


def overall_sparsity(choice: Mapping[str, Tensor]) -> float:
    """Return the fraction of all indices that a choice removes."""
    total = sum(mask.numel() for mask in choice.values())
    return 1.0 - sum(int(mask.sum()) for mask in choice.values()) / total if total else 0.0


def counts_of(choice: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many indices each group keeps."""
    return {name: int(mask.sum()) for name, mask in choice.items()}


def without(scores: GroupScores, choice: Mapping[str, Tensor]) -> GroupScores:
    """Rank what a choice has removed below all else, so that what is pruned stays pruned."""
    kept: Iterable[tuple[str, Tensor]] = scores.items()
    found = {
        n: s.masked_fill(~choice[n], -math.inf) if n in choice and len(choice[n]) == len(s) else s
        for n, s in kept
    }
    return GroupScores(found, scores.kinds)
