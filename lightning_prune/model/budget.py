"""Solves for a budget: which choice among groups costs what may be spent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_prune.core.budgets import Budget
from lightning_prune.core.types import GroupScores, Scope
from lightning_prune.graph import Choice, Couplings
from lightning_prune.model.calls import Call, replaying
from lightning_prune.model.grouping import Coupled, allowed, choose, counts_of, keep, overall_sparsity
from lightning_prune.model.latency import measure_latencies
from lightning_prune.model.surgery import execute_

NUM_BISECTIONS = 24
NUM_LATENCIES = 8
CostOf = Callable[[Choice], float]
"""A choice -> its cost as a fraction of the dense model's."""


def solve(
    budget: Budget,
    scores: GroupScores,
    cost_of: CostOf,
    *,
    granularity: Coupled,
    scope: Scope,
    ties: Sequence[Sequence[str]] = (),
) -> dict[str, Tensor]:
    """Return the choice whose cost is nearest to the budget, among those that scores and scope give.

    Sparsity is bisected; then single groups are moved by one allowed step at a time, whichever brings the cost nearest
    to the budget. A latency takes too long to measure for that second part.

    Args:
        budget: what may be spent.
        scores: of all groups.
        cost_of: a choice -> its cost, which falls as more is removed.
        granularity: says what numbers are allowed.
        scope: who competes with whom.
        ties: sets of groups that keep equally many.

    Returns:
        Group name -> bool (size,), True is kept.

    Raises:
        ValueError: no choice is within the tolerance; the nearest cost that can be reached is named.
    """

    def at(sparsity: float) -> dict[str, Tensor]:
        return choose(scores, sparsity, granularity=granularity, scope=scope, ties=ties)

    least = sum(allowed(0, len(found), granularity) for found in scores.values())
    low, high = 0.0, 1.0 - least / sum(len(found) for found in scores.values())
    above, below = at(low), at(high)
    if cost_of(below) > budget.fraction + budget.tolerance:
        _refuse(budget, cost_of(below))
    best = min((above, below), key=lambda found: abs(cost_of(found) - budget.fraction))
    for _ in range(NUM_LATENCIES if budget.kind == "latency" else NUM_BISECTIONS):
        middle = (low + high) / 2
        found = at(middle)
        if cost_of(found) > budget.fraction:
            low, above = middle, found
        else:
            high, below = middle, found
        best = min((best, found), key=lambda choice: abs(cost_of(choice) - budget.fraction))
        if abs(cost_of(best) - budget.fraction) < budget.tolerance / 4:
            break
    if budget.kind == "latency":
        best = min(
            (best, _between(budget, scores, cost_of, above, below, ties)),
            key=lambda c: abs(cost_of(c) - budget.fraction),
        )
    else:
        best = _approached(budget, scores, cost_of, best, granularity, ties)
    if abs((cost := cost_of(best)) - budget.fraction) > budget.tolerance:
        _refuse(budget, cost)
    return best


def _between(
    budget: Budget,
    scores: GroupScores,
    cost_of: CostOf,
    above: Choice,
    below: Choice,
    ties: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """Where the cost jumps between two choices, take the first groups from the one and the rest from the other."""
    first, second = counts_of(above), counts_of(below)
    units = list(
        dict.fromkeys(tuple(next((t for t in ties if n in t), (n,))) for n in scores if first[n] != second[n])
    )

    def mixed(num: int) -> dict[str, Tensor]:
        moved = {name: second[name] for unit in units[:num] for name in unit if name in second}
        return keep(scores, first | moved)

    low, high, best = 0, len(units), mixed(0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_of(mixed(middle)) > budget.fraction else (low, middle)
        best = min((best, mixed(middle)), key=lambda c: abs(cost_of(c) - budget.fraction))
    return best


def _approached(
    budget: Budget,
    scores: GroupScores,
    cost_of: CostOf,
    best: dict[str, Tensor],
    granularity: Coupled,
    ties: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """Move one group (or tied groups) a step, the move that comes nearest, until none comes nearer."""
    together = {name: [other for other in tie if other in scores] for tie in ties for name in tie}
    while True:
        counts, distance = counts_of(best), abs(cost_of(best) - budget.fraction)
        if distance < budget.tolerance / 4:
            return best
        moves = []
        for name, found in scores.items():
            step = granularity.step(len(found))
            for count in {allowed(counts[name] + d, len(found), granularity) for d in (-step, step)}:
                moved = counts | dict.fromkeys(together.get(name, [name]), count)
                moves.append(keep(scores, moved))
        nearest = min(moves, key=lambda choice: abs(cost_of(choice) - budget.fraction))
        if abs(cost_of(nearest) - budget.fraction) >= distance:
            return best
        best = nearest


def _refuse(budget: Budget, nearest: float) -> None:
    raise ValueError(
        f"`budget` {budget.kind}={budget.fraction} is out of reach for these groups: the nearest within reach is "
        f"{budget.kind}={nearest:.3f} of the dense model. Allow more groups (`include`, `exclude`, `min_keep`, "
        "`multiple_of`), or a larger `tolerance`."
    )


def cost_function(budget: Budget, couplings: Couplings, call: Call, others: Mapping[str, int]) -> CostOf:
    """Return what computes the cost that a budget limits.

    Args:
        budget: says which cost.
        couplings: of the dense model.
        call: the example call, whose latency is measured.
        others: sizes of groups that are frozen or were cut before; they stay.
    """
    if budget.kind == "latency":
        return _Latency(couplings, call)
    count: Callable[[Mapping[str, int]], int] = {
        "params": couplings.num_params,
        "macs": couplings.macs,
        "num_bytes": couplings.num_bytes,
    }[budget.kind]
    dense = count(others)
    return lambda choice: count({**others, **counts_of(choice)}) / dense


class _Latency:
    """Measures a smaller copy against the dense model, in turns; the same choice is measured once."""

    def __init__(self, couplings: Couplings, call: Call) -> None:
        self.couplings, self.call = couplings, call
        self.known: dict[tuple[tuple[str, int], ...], float] = {}

    def __call__(self, choice: Choice) -> float:
        key = tuple(counts_of(choice).items())
        if key not in self.known:
            self.known[key] = self._measured(choice) if overall_sparsity(choice) else 1.0
        return self.known[key]

    def _measured(self, choice: Choice) -> float:
        root = self.couplings.run.root
        small_root = copy.deepcopy(root)
        execute_(small_root, self.couplings.plan(choice))
        path = self.couplings.run.paths[self.call.module]
        small = replace(self.call, module=small_root.get_submodule(path))
        with replaying(root, self.call) as dense_call, replaying(small_root, small) as small_call:
            dense, after = measure_latencies(dense_call, small_call)
        return after.median_ms / dense.median_ms
