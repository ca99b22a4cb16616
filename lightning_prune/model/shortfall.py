"""What is said where less, or more, has gone than was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_prune.core.granularities import Channel
from lightning_prune.core.patterns import listed
from lightning_prune.model.contest import Contest
from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.grouping import Coupled, allowed
from lightning_prune.model.prices import Counts
from lightning_prune.model.pruning import Pruner

if TYPE_CHECKING:
    from lightning_prune.model.shrinking import AnyPruner

THIN_CHANNELS = 0.05
UNITS = {"block": "blocks", "branch": "branches"}
NEAR = 0.05
"""By how much the sparsity of coupled groups may be missed without a word, since their sizes come in multiples."""


def shortfall(pruner: AnyPruner) -> str | None:
    """Say by how much a pruner that has come to its end misses its goal, and why; None where it is near.

    A guard says it itself.
    """
    if isinstance(pruner, GroupPruner) and (missed := pruner.missed or _missed_sparsity(pruner)):
        return missed
    if isinstance(pruner, DepthPruner) and len(pruner.skipped) < pruner.num_requested:
        return _missed_blocks(pruner)
    if pruner.final_sparsity and not pruner.sparsity and getattr(pruner, "guard", None) is None:
        return (
            f"Nothing was removed: of the {pruner.num_groups} that compete, a sparsity of {pruner.final_sparsity:.4g} "
            "comes to none, by the sizes that `scope` and `granularity` allow."
        )
    return _missed_by_scope(pruner) if isinstance(pruner, Pruner) and pruner.guard is None else None


def thin_groups(pruner: AnyPruner) -> Iterator[tuple[str, int, int]]:
    """Yield the groups that are left so little that they may not carry a signal, with what they keep and had.

    A norm over one channel gives the same whatever comes in.
    """
    if isinstance(pruner, GroupPruner):
        kept = pruner.contest.counts(pruner.choice)
        for name, whole in pruner.contest.sizes.items():
            if kept[name] < THIN_CHANNELS * whole or (kept[name] == 1 and whole >= 8):
                yield name, kept[name], whole


def said_of_thin(pruner: AnyPruner) -> str | None:
    """Say that groups of a pruner that has come to its end are left very little; None where none is."""
    told = [f"`{name}` ({kept} of {whole})" for name, kept, whole in thin_groups(pruner)]
    if not told:
        return None
    return f"Very little is left of {listed(told, num_shown=5)}: raise `min_keep`, or take less sparsity."


def _missed_blocks(pruner: DepthPruner) -> str:
    """Say why fewer blocks are gone than were asked for: some cannot go, or `min_keep` holds them."""
    of = f"of the {pruner.num_groups} {UNITS[pruner.granularity.unit]}"
    start = f"Nothing was removed {of}, where {pruner.num_requested} were to go."
    if gone := len(pruner.skipped):
        start = f"`sparsity` of {pruner.final_sparsity:.4g} is missed: {gone} {of} are gone."
    return start + (pruner.said_of_frozen or f" `min_keep` {pruner.granularity.min_keep} lets no more go.")


def _missed_by_scope(pruner: Pruner) -> str | None:
    """Say which layers have so few groups that the scope cannot take as much of them as was asked for."""
    goal, reached = pruner.final_sparsity, pruner.group_sparsity
    if abs(goal - reached) <= NEAR + 1 / pruner.num_groups:
        return None
    told = [f"`{name}` ({kept} of {size})" for name, (size, kept) in pruner.counts().items()]
    return (
        f"`sparsity` of {goal:.4g} is missed: {reached:.4g} of the {pruner.num_groups} groups are gone, as near as "
        f"`scope` {pruner.recipe.scope} comes with so few: {listed(told, num_shown=8)}."
    )


def _missed_sparsity(pruner: GroupPruner) -> str | None:
    """Say which groups have come to the least that they may keep, or how their sizes were rounded."""
    contest, goal, reached = pruner.contest, pruner.final_sparsity, pruner.sparsity
    if contest.recipe.budget is not None or abs(goal - reached) <= NEAR + 1 / pruner.num_groups:
        return None
    counts, granularity = contest.counts(pruner.choice), contest.granularity
    least = [name for name, size in contest.sizes.items() if counts[name] <= allowed(0, size, granularity)]
    why, blamed = "Groups whose sizes were rounded", list(contest.sizes)
    if reached < goal and least:
        why, blamed = "Groups that keep the least that they may", least
    return (
        f"`sparsity` of {goal:.4g} is missed: {reached:.4g} of the {pruner.num_groups} channels or heads are gone. "
        f"{why}: {_kept(blamed, counts, contest)}. {_advice(granularity, contest, blamed)}"
    )


def _kept(names: list[str], counts: Counts, contest: Contest) -> str:
    return listed([f"`{name}` ({counts[name]} of {contest.sizes[name]})" for name in names], num_shown=8)


def _advice(granularity: Coupled, contest: Contest, names: list[str]) -> str:
    """Return which setting to change: the one that binds these groups."""
    is_in_steps = any(granularity.step(contest.sizes[name]) > 1 for name in names)
    if isinstance(granularity, Channel) and is_in_steps:
        return f"`multiple_of` below {granularity.multiple_of} would let them keep other numbers."
    return f"Ask for another `sparsity`, or let them keep less than `min_keep` {granularity.min_keep}."
