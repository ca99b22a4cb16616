"""Solves for a budget in depth: how many of the ranked blocks go, so that the model costs what may be spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

from torch import Tensor, nn

from lightning_prune.core.budgets import Budget
from lightning_prune.graph import Block, Couplings, Plan
from lightning_prune.graph.projection import size_of
from lightning_prune.model.budget import out_of_reach
from lightning_prune.model.calls import Call
from lightning_prune.model.prices import LatencyOf, Measured

CostWithout: TypeAlias = Callable[[Collection[str]], float]
"""Paths of blocks that are gone -> the cost as a fraction of the dense model's."""
SETTINGS = "`include`, `exclude`, `min_keep`"


def cost_without(
    budget: Budget, couplings: Couplings, blocks: Mapping[str, Block], call: Call
) -> CostWithout:
    """Return what computes the cost that a budget limits, of the model without some of its blocks.

    Args:
        budget: says which cost.
        couplings: of the dense model.
        blocks: those that can go, by path.
        call: the example call, whose latency is measured.
    """
    if budget.kind == "macs":
        return _macs_without(couplings)
    if budget.kind == "latency":
        return _latency_without(budget, couplings, blocks, call)
    root = couplings.run.root

    def count(gone: Collection[str]) -> int:
        copies = [path for path, original in couplings.followed.items() if original in gone]
        left = _tensors_without(root, [*gone, *copies])
        if budget.kind == "params":
            return sum(tensor.numel() for tensor in left if isinstance(tensor, nn.Parameter))
        return sum(tensor.numel() * tensor.element_size() for tensor in left)

    whole = count(())
    return lambda gone: count(gone) / whole


def _tensors_without(root: nn.Module, gone: Collection[str]) -> list[Tensor]:
    """Return the parameters and buffers outside of some modules; what is shared with one outside stays."""
    inside = tuple(f"{path}." for path in gone)
    named = chain(root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False))
    return list({id(tensor): tensor for name, tensor in named if not name.startswith(inside)}.values())


def _macs_without(couplings: Couplings) -> CostWithout:
    work = [
        (f"{op.path}.", sum(math.prod(size_of(node, {}) for node in term) for term in op.macs))
        for op in couplings.record.ops
    ]
    whole = couplings.macs({})
    return lambda gone: (
        sum(macs for path, macs in work if not path.startswith(tuple(f"{p}." for p in gone))) / whole
    )


def _latency_without(
    budget: Budget, couplings: Couplings, blocks: Mapping[str, Block], call: Call
) -> CostWithout:
    def plan(counts: Mapping[str, int]) -> Plan:
        gone = {path: blocks[path].replacement for path, kept in counts.items() if not kept}
        return Plan(slices={}, shapes=couplings.shapes, replaced=gone)

    latency_of = LatencyOf(
        couplings, call, Measured(), precision=budget.tolerance / 2, sizes=dict.fromkeys(blocks, 1), plan=plan
    )
    return lambda gone: latency_of({path: int(path not in gone) for path in blocks})


def solve_depth(budget: Budget, cost_at: Callable[[int], float], most: int) -> int:
    """Return how many blocks go, so that the cost is nearest to the budget; it is bisected.

    Args:
        budget: what may be spent.
        cost_at: how many of the ranked blocks are gone -> the cost, which falls with them.
        most: how many may go.

    Raises:
        ValueError: the nearest cost is not within the tolerance; those on both sides of the budget are named.

    Example:
        >>> solve_depth(Budget(params=0.5), lambda num: 1 - num / 4, most=3)
        2
    """
    low, high = 0, most  # the fewest that meet the budget are among them, or the most do not
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost_at(middle) <= budget.fraction else (middle + 1, high)
    near = [low - 1, low] if low and cost_at(low) <= budget.fraction else [low]
    best = min(near, key=lambda num: abs(cost_at(num) - budget.fraction))
    if abs(cost_at(best) - budget.fraction) > budget.tolerance:
        raise out_of_reach(budget, *map(cost_at, near), settings=SETTINGS)
    return best


def check_depth_reach(budget: Budget, cost: CostWithout, paths: Sequence[str], most: int) -> None:
    """Refuse a budget that no ranking of the blocks comes near; a latency is seen when it is measured.

    Raises:
        ValueError: the nearest costs on both sides of the budget are named.
    """
    if budget.kind == "latency":
        return
    by_cost = sorted(paths, key=lambda path: cost([path]))  # the dearest block first
    spans = [(cost(by_cost[:num]), cost(by_cost[len(paths) - num :])) for num in range(most + 1)]
    if any(low - budget.tolerance <= budget.fraction <= high + budget.tolerance for low, high in spans):
        return
    above = min(low for low, _ in spans if low > budget.fraction)
    below = [high for _, high in spans if high < budget.fraction]
    raise out_of_reach(budget, above, *([max(below)] if below else []), settings=SETTINGS)
