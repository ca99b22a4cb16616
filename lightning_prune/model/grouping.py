"""From scores of weights to a choice among coupled groups."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.core.allocation import floor_of
from lightning_prune.core.granularities import Channel, Head
from lightning_prune.core.selection import keep_top
from lightning_prune.core.types import GroupScores, Name, Scope, Scores
from lightning_prune.graph import Couplings, Group, Member
from lightning_prune.graph.projection import positions

Coupled = Channel | Head


def candidates(
    couplings: Couplings,
    granularity: Coupled,
    scored: Collection[Name],
    protected: Mapping[Name, Collection[int]],
    dims: Mapping[Name, Collection[int]] | None = None,
) -> dict[str, Group]:
    """Return the groups that a granularity prunes: those with a scored weight, of which no protected one is written.

    Args:
        couplings: of the model.
        granularity: says which roles count.
        scored: parameters that have scores.
        protected: parameters whose outputs stay, and the dims of these; what they read can go.
        dims: along which scores count, by parameter; all by default.
    """
    return {
        name: group
        for name, group in couplings.groups.items()
        if granularity.prunes(group.role)
        and any(member.tensor in scored and _counts(member, dims) for member in group.members)
        and not any(member.dim in protected.get(member.tensor, ()) for member in group.members)
    }


def score_groups(
    groups: Mapping[str, Group],
    scores: Scores,
    granularity: Coupled,
    sizes: Mapping[str, int] | None = None,
    dims: Mapping[Name, Collection[int]] | None = None,
) -> GroupScores:
    """Reduce the scores of all coupled weights to one per index of each group.

    Args:
        groups: by name.
        scores: of weights; each tensor is read once.
        granularity: says how they are reduced and normalised.
        sizes: of groups, before some of their indices were cut; by default those of now.
        dims: along which scores count, by parameter, where all weights of an index have the same one, which counts
            once; all by default.

    Returns:
        For each group a tensor (size,), higher is kept, with the groups' kinds. Indices that were cut come last, with
        minus infinity, so that they take part in the contest as what has lost it; in a mean they count as zeros.
    """
    start = -math.inf if granularity.reduction == "max" else 0.0
    total = {name: torch.full((group.size,), start, dtype=torch.float64) for name, group in groups.items()}
    count = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in groups.items()}
    members: dict[Name, list[tuple[str, Member]]] = {}
    for name, group in groups.items():
        for member in (m for m in group.members if _counts(m, dims)):
            members.setdefault(member.tensor, []).append((name, member))
    for tensor, found in scores.items():
        for name, member in members.get(tensor, ()):
            along = found if dims is None else one_of_each(found, member.dim)
            _add_(total, count, name, member, along, granularity.reduction)
    if granularity.reduction == "mean":
        total = {name: t / count[name].clamp_min(1) for name, t in total.items()}
    kinds = {name: group.kind for name, group in groups.items()}
    sizes = sizes or {name: group.size for name, group in groups.items()}
    found_scores = {n: _normalised(t, granularity.normalize, sizes[n]) for n, t in total.items()}
    return GroupScores(
        {n: nn.functional.pad(t, (0, sizes[n] - len(t)), value=-math.inf) for n, t in found_scores.items()},
        kinds,
    )


def _counts(member: Member, dims: Mapping[Name, Collection[int]] | None) -> bool:
    return dims is None or member.dim in dims.get(member.tensor, ())


def one_of_each(scores: Tensor, dim: int) -> Tensor:
    """Return one score for each index along a dim: that of its weights, which have the same one."""
    return scores.movedim(dim, 0).flatten(1).double().mean(1, keepdim=True).movedim(0, dim)


def _add_(
    total: dict[str, Tensor],
    count: dict[str, Tensor],
    name: str,
    member: Member,
    scores: Tensor,
    reduction: str,
) -> None:
    """Add the scores of one tensor to those of a group that occurs in it."""
    along = _reduced(scores, member.dim, reduction)
    index = positions(member.type, member.atom)
    is_member = index >= 0
    total[name] = _gathered(total[name], index[is_member], along[is_member], reduction)
    per_index = scores.numel() / scores.shape[member.dim]
    ones = torch.full((int(is_member.sum()),), per_index, dtype=torch.float64)
    count[name].index_add_(0, index[is_member], ones)


def _reduced(scores: Tensor, dim: int, reduction: str) -> Tensor:
    matrix = scores.detach().movedim(dim, 0).flatten(1).double().cpu()
    return matrix.amax(1) if reduction == "max" else matrix.sum(1)


def _gathered(total: Tensor, index: Tensor, values: Tensor, reduction: str) -> Tensor:
    if reduction == "max":
        return total.scatter_reduce(0, index, values, "amax")
    return total.index_add(0, index, values)


def _normalised(scores: Tensor, how: str, size: int) -> Tensor:
    if how == "none":
        return scores
    unit = (
        scores.abs().sum() / size if how == "mean" else scores.abs().max()
    )  # some criteria give signed scores
    return scores / unit if float(unit) > 0 else scores


def count(
    scores: GroupScores,
    sparsity: float,
    *,
    granularity: Coupled,
    scope: Scope,
    ties: Sequence[Sequence[str]] = (),
) -> dict[str, int]:
    """Let the groups compete, and bring their numbers to sizes that are allowed.

    Args:
        scores: of each group, (size,).
        sparsity: fraction of all indices to remove, in [0, 1).
        granularity: says what numbers are a multiple of, and how many stay at least.
        scope: who competes with whom.
        ties: sets of groups that keep equally many.

    Returns:
        How many indices each group keeps.
    """
    if not scores:
        return {}
    counts = {name: int(mask.sum()) for name, mask in scope(scores, sparsity).items()}
    for tie in ties:
        here = [name for name in tie if name in counts]
        if here:
            counts |= dict.fromkeys(here, round(sum(counts[name] for name in here) / len(here)))
    return {name: allowed(kept, len(scores[name]), granularity) for name, kept in counts.items()}


def keep(scores: GroupScores, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Keep the best `counts` indices of each group; among equals the lower index. What is gone, stays gone.

    Returns:
        Group name -> bool (size,), True is kept.
    """
    return {
        name: keep_top({name: found}, counts[name])[name] & (found > -math.inf)
        for name, found in scores.items()
    }


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


def sparsity_of_counts(counts: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Return the fraction of all indices that is removed where groups keep `counts`; those not named keep all.

    Example:
        >>> sparsity_of_counts({"a": 1}, {"a": 4, "b": 6})
        0.3
    """
    total = sum(sizes.values())
    return sum(size - counts.get(name, size) for name, size in sizes.items()) / total if total else 0.0


def counts_of(choice: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many indices each group keeps."""
    return {name: int(mask.sum()) for name, mask in choice.items()}


def without(scores: GroupScores, choice: Mapping[str, Tensor]) -> GroupScores:
    """Rank what a choice has removed below all else, so that what is pruned stays pruned."""
    found = dict(scores)
    for name, mask in choice.items():
        if name in found:
            gone = nn.functional.pad(~mask, (0, len(found[name]) - len(mask)), value=True)
            found[name] = found[name].masked_fill(gone, -math.inf)
    return GroupScores(found, scores.kinds)
