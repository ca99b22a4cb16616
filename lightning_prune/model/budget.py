"""Solves for a budget: how many indices each group keeps, so that the model costs what may be spent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeAlias

from lightning_prune.core.budgets import Budget
from lightning_prune.core.types import GroupScores, Scope
from lightning_prune.model.grouping import Coupled, allowed, count
from lightning_prune.model.prices import CostOf, Counts

NUM_BISECTIONS = 24
NUM_MEASURED = 8
MAX_TRIED = 1 << 12  # choices: all are tried where there are no more
MAX_PAIRED = 40  # groups: their pairs are tried; more of them are fine enough one by one
Ties: TypeAlias = Sequence[Sequence[str]]


def solve(
    budget: Budget,
    scores: GroupScores,
    cost_of: CostOf,
    *,
    granularity: Coupled,
    scope: Scope,
    ties: Ties = (),
    guide: CostOf | None = None,
) -> Counts:
    """Return the numbers whose cost is nearest to the budget, among those that scores and scope give.

    Sparsity is bisected; then single groups are moved by one allowed step at a time, whichever brings the cost nearest
    to the budget; of few small groups, which cannot be cut finely, everything is tried if need be. What takes long to
    find out, as a latency does, is asked for a few times only: where it jumps between two choices, the first groups are
    taken from the one and the rest from the other, and `guide` picks the moves.

    Args:
        budget: what may be spent.
        scores: of all groups.
        cost_of: what numbers cost.
        granularity: says what numbers are allowed.
        scope: who competes with whom.
        ties: sets of groups that keep equally many.
        guide: a cost that is known at once and falls alike; with it, `cost_of` is one that takes long.

    Returns:
        Group name -> how many indices it keeps.

    Raises:
        ValueError: no choice is within the tolerance; the nearest cost that can be reached is named.
    """

    def at(sparsity: float) -> Counts:
        return count(scores, sparsity, granularity=granularity, scope=scope, ties=ties)

    def distance(counts: Counts) -> float:
        return abs(cost_of(counts) - budget.fraction)

    def change(counts: Counts) -> int:
        return sum(abs(kept - best[name]) for name, kept in counts.items())

    sizes = {name: len(found) for name, found in scores.items()}
    least = sum(allowed(0, size, granularity) for size in sizes.values())
    most = 1.0 - least / sum(sizes.values())
    above, below, best = _bisected(budget, cost_of, at, most, NUM_MEASURED if guide else NUM_BISECTIONS)
    moves = _Moves(sizes, granularity, ties)
    if guide is None:
        best = _approached(budget, cost_of, best, moves)
        if distance(best) > budget.tolerance:
            best = min(
                (best, *moves.everything()), key=lambda c: (max(distance(c), budget.tolerance), change(c))
            )
    else:
        best = min((best, _between(budget, cost_of, above, below, ties)), key=distance)
        best = _guided(budget, cost_of, guide, best, moves)
    if distance(best) > budget.tolerance:
        raise out_of_reach(budget, cost_of(best))
    return best


def _bisected(
    budget: Budget, cost_of: CostOf, at: Callable[[float], Counts], most: float, num: int
) -> tuple[Counts, Counts, Counts]:
    """Return the counts between which the budget lies, dearer and cheaper, and the nearest, in `num` steps at most."""

    def distance(counts: Counts) -> float:
        return abs(cost_of(counts) - budget.fraction)

    low, above = 0.0, at(0.0)
    high, below = _most(at, most)
    best = min((above, below), key=distance)
    for _ in range(num):
        if distance(best) < budget.tolerance / 4 or cost_of(below) > budget.fraction:
            break
        middle = (low + high) / 2
        found = at(middle)
        if cost_of(found) > budget.fraction:
            low, above = middle, found
        else:
            high, below = middle, found
        best = min((best, found), key=distance)
    return above, below, best


def out_of_reach(
    budget: Budget,
    *nearest: float,
    settings: str = "`include`, `exclude`, `min_keep`, `multiple_of`",
) -> ValueError:
    """Return the error that names the nearest cost, or those on both sides, and the settings that allow others."""
    told = " and ".join(f"{budget.kind}={cost:.3f}" for cost in nearest)
    return ValueError(
        f"`budget` {budget.kind}={budget.fraction} is out of reach for these groups: the nearest within reach "
        f"{'are' if len(nearest) > 1 else 'is'} {told} of the dense model. Allow more groups ({settings}), or a larger "
        "`tolerance`."
    )


def _most(at: Callable[[float], Counts], high: float) -> tuple[float, Counts]:
    """Return the highest sparsity up to `high` that the scope agrees to, whose own `min_keep` may ask for more."""
    try:
        return high, at(high)
    except ValueError:
        low = 0.0
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        try:
            at(middle)
            low = middle
        except ValueError:
            high = middle
    return low, at(low)


def _between(budget: Budget, cost_of: CostOf, above: Counts, below: Counts, ties: Ties) -> Counts:
    """Where the cost jumps between two choices, take the first groups from the one and the rest from the other."""
    units = list(
        dict.fromkeys(tuple(next((t for t in ties if n in t), (n,))) for n in above if above[n] != below[n])
    )

    def mixed(num: int) -> Counts:
        return above | {name: below[name] for unit in units[:num] for name in unit if name in below}

    low, high, best = 0, len(units), mixed(0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_of(mixed(middle)) > budget.fraction else (low, middle)
        best = min((best, mixed(middle)), key=lambda counts: abs(cost_of(counts) - budget.fraction))
    return best


@dataclass(frozen=True)
class _Moves:
    """One group, or groups that are tied, a step up or down."""

    sizes: Mapping[str, int]
    granularity: Coupled
    ties: Ties

    def __call__(self, counts: Counts) -> list[Counts]:
        together, found = self._together(), []
        for name, size in self.sizes.items():
            step = self.granularity.step(size)
            for kept in {allowed(counts[name] + d, size, self.granularity) for d in (-step, step)}:
                found.append(counts | dict.fromkeys(together[name], kept))
        return found

    def everything(self) -> list[Counts]:
        """Return all there is to choose from, or nothing where it is more than `MAX_TRIED`."""
        units = list(dict.fromkeys(self._together().values()))
        sizes = [self.sizes[unit[0]] for unit in units]
        grids = [sorted({allowed(n, size, self.granularity) for n in range(size + 1)}) for size in sizes]
        if math.prod(map(len, grids)) > MAX_TRIED:
            return []
        return [
            {name: kept for unit, kept in zip(units, picked, strict=True) for name in unit}
            for picked in itertools.product(*grids)
        ]

    def _together(self) -> dict[str, tuple[str, ...]]:
        """Return the groups that move with each one, itself among them."""
        tied = {name: tuple(n for n in tie if n in self.sizes) for tie in self.ties for name in tie}
        return {name: tied.get(name, (name,)) for name in self.sizes}


def _approached(budget: Budget, cost_of: CostOf, best: Counts, moves: _Moves) -> Counts:
    """Make the move that comes nearest, until none comes nearer; out of tolerance, also two moves at once."""

    def distance(counts: Counts) -> float:
        return abs(cost_of(counts) - budget.fraction)

    while distance(best) >= budget.tolerance / 4:
        nearest = min(moves(best), key=distance)
        is_stuck = distance(nearest) >= distance(best) > budget.tolerance
        if is_stuck and len(best) <= MAX_PAIRED:
            nearest = min((second for first in moves(best) for second in moves(first)), key=distance)
        if distance(nearest) >= distance(best):
            break
        best = nearest
    return best


def _guided(budget: Budget, cost_of: CostOf, guide: CostOf, best: Counts, moves: _Moves) -> Counts:
    """Try moves that come near if the cost falls along with the guide, as it did from the dense model to here."""
    tried = [best]
    for _ in range(NUM_MEASURED):
        here, work = cost_of(best), guide(best)
        slope = (1.0 - here) / (1.0 - work) if work < 1.0 else 1.0
        estimates = [
            (abs(here + slope * (guide(move) - work) - budget.fraction), move)
            for move in moves(best)
            if move not in tried
        ]
        distance, move = min(estimates, key=itemgetter(0), default=(math.inf, best))
        if distance >= abs(here - budget.fraction) or abs(here - budget.fraction) < budget.tolerance / 2:
            break
        tried.append(move)
        if abs(cost_of(move) - budget.fraction) < abs(here - budget.fraction):
            best = move
    return best
