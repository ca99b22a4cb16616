"""Solves for a budget: how many indices each group keeps, so that the model costs what may be spent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from lightning_prune.core.budgets import Budget
from lightning_prune.core.types import GroupScores, Scope
from lightning_prune.graph import Couplings
from lightning_prune.model.calls import Call, replaying
from lightning_prune.model.grouping import Coupled, allowed, count
from lightning_prune.model.latency import measure_latencies
from lightning_prune.model.surgery import execute_

NUM_BISECTIONS = 24
NUM_LATENCIES = 8
Counts: TypeAlias = dict[str, int]
"""Group name -> how many indices it keeps."""
CostOf: TypeAlias = Callable[[Counts], float]
"""Counts -> the cost as a fraction of the dense model's; it falls with them."""
Ties: TypeAlias = Sequence[Sequence[str]]


def solve(
    budget: Budget,
    scores: GroupScores,
    cost_of: CostOf,
    *,
    granularity: Coupled,
    scope: Scope,
    ties: Ties = (),
) -> Counts:
    """Return the numbers whose cost is nearest to the budget, among those that scores and scope give.

    Sparsity is bisected; then single groups are moved by one allowed step at a time, whichever brings the cost nearest
    to the budget. A latency takes too long to measure for that second part: there, the first groups are taken from
    the one and the rest from the other of the two last choices.

    Args:
        budget: what may be spent.
        scores: of all groups.
        cost_of: what numbers cost.
        granularity: says what numbers are allowed.
        scope: who competes with whom.
        ties: sets of groups that keep equally many.

    Returns:
        Group name -> how many indices it keeps.

    Raises:
        ValueError: no choice is within the tolerance; the nearest cost that can be reached is named.
    """

    def at(sparsity: float) -> Counts:
        return count(scores, sparsity, granularity=granularity, scope=scope, ties=ties)

    def distance(counts: Counts) -> float:
        return abs(cost_of(counts) - budget.fraction)

    least = sum(allowed(0, len(found), granularity) for found in scores.values())
    low, above = 0.0, at(0.0)
    high, below = _most(at, 1.0 - least / sum(len(found) for found in scores.values()))
    best = min((above, below), key=distance)
    for _ in range(NUM_LATENCIES if budget.kind == "latency" else NUM_BISECTIONS):
        if distance(best) < budget.tolerance / 4 or cost_of(below) > budget.fraction:
            break
        middle = (low + high) / 2
        found = at(middle)
        if cost_of(found) > budget.fraction:
            low, above = middle, found
        else:
            high, below = middle, found
        best = min((best, found), key=distance)
    if budget.kind == "latency":
        best = min((best, _between(budget, cost_of, above, below, ties)), key=distance)
    else:
        best = _approached(budget, cost_of, best, {n: len(s) for n, s in scores.items()}, granularity, ties)
    if distance(best) > budget.tolerance:
        raise ValueError(
            f"`budget` {budget.kind}={budget.fraction} is out of reach for these groups: the nearest within reach is "
            f"{budget.kind}={cost_of(best):.3f} of the dense model. Allow more groups (`include`, `exclude`, "
            "`min_keep`, `multiple_of`), or a larger `tolerance`."
        )
    return best


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


def _approached(
    budget: Budget,
    cost_of: CostOf,
    best: Counts,
    sizes: Mapping[str, int],
    granularity: Coupled,
    ties: Ties,
) -> Counts:
    """Move one group (or tied groups) a step, the move that comes nearest, until none comes nearer."""
    together = {name: [other for other in tie if other in sizes] for tie in ties for name in tie}
    while (distance := abs(cost_of(best) - budget.fraction)) >= budget.tolerance / 4:
        moves = []
        for name, size in sizes.items():
            step = granularity.step(size)
            for kept in {allowed(best[name] + d, size, granularity) for d in (-step, step)}:
                moves.append(best | dict.fromkeys(together.get(name, [name]), kept))
        nearest = min(moves, key=lambda counts: abs(cost_of(counts) - budget.fraction))
        if abs(cost_of(nearest) - budget.fraction) >= distance:
            break
        best = nearest
    return best


def cost_function(budget: Budget, couplings: Couplings, call: Call, spent: float = 1.0) -> CostOf:
    """Return what computes the cost that a budget limits, as a fraction of the dense model's.

    Args:
        budget: says which cost.
        couplings: of the model as it is now.
        call: the example call, whose latency is measured.
        spent: what the model as it is now costs, as a fraction of the dense one's; below 1 where it was cut before.
    """
    if budget.kind == "latency":
        return _Latency(couplings, call)
    count_of: Callable[[Mapping[str, int]], int] = {
        "params": couplings.num_params,
        "macs": couplings.macs,
        "num_bytes": couplings.num_bytes,
    }[budget.kind]
    whole = count_of({})
    sizes = {name: group.size for name, group in couplings.groups.items()}
    return lambda counts: (
        spent * count_of({n: min(c, sizes[n]) for n, c in counts.items() if n in sizes}) / whole
    )


class _Latency:
    """Measures a smaller copy against the dense model, in turns; the same counts are measured once."""

    def __init__(self, couplings: Couplings, call: Call) -> None:
        self.couplings, self.call = couplings, call
        self.known: dict[tuple[tuple[str, int], ...], float] = {}

    def __call__(self, counts: Counts) -> float:
        key = tuple(counts.items())
        if key not in self.known:
            groups = self.couplings.groups
            is_whole = all(groups[name].size == kept for name, kept in counts.items())
            self.known[key] = 1.0 if is_whole else self._measured(counts)
        return self.known[key]

    def _measured(self, counts: Counts) -> float:
        """Measure; which indices are kept makes no difference to the time, so the first are."""
        root, groups = self.couplings.run.root, self.couplings.groups
        choice = {name: torch.arange(groups[name].size) < kept for name, kept in counts.items()}
        small_root = copy.deepcopy(root)
        execute_(small_root, self.couplings.plan(choice))
        small = replace(
            self.call, module=small_root.get_submodule(self.couplings.run.paths[self.call.module])
        )
        with replaying(root, self.call) as dense_call, replaying(small_root, small) as small_call:
            dense, after = measure_latencies(dense_call, small_call)
        return after.median_ms / dense.median_ms
