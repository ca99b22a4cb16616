"""What it costs to keep so many indices: counted on the couplings, or measured on a smaller copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch

from lightning_prune.core.budgets import Budget
from lightning_prune.graph import Couplings
from lightning_prune.model.calls import Call, replaying
from lightning_prune.model.latency import measure_latencies
from lightning_prune.model.surgery import execute_
from lightning_prune.report.progress import working

Counts: TypeAlias = dict[str, int]
"""Group name -> how many indices it keeps."""
CostOf: TypeAlias = Callable[[Counts], float]
"""Counts -> the cost as a fraction of the dense model's; it falls with them."""


def cost_function(budget: Budget, couplings: Couplings, call: Call, spent: float = 1.0) -> CostOf:
    """Return what computes the cost that a budget limits, as a fraction of the dense model's.

    Args:
        budget: says which cost.
        couplings: of the model as it is now.
        call: the example call, whose latency is measured.
        spent: what the model as it is now costs, as a fraction of the dense one's; below 1 where it was cut before.
    """
    return _Latency(couplings, call) if budget.kind == "latency" else counted(budget.kind, couplings, spent)


def counted(kind: str, couplings: Couplings, spent: float = 1.0) -> CostOf:
    """Return what counts "params", "macs" or "num_bytes", exactly and at once."""
    count_of: Callable[[Mapping[str, int]], int] = {
        "params": couplings.num_params,
        "macs": couplings.macs,
        "num_bytes": couplings.num_bytes,
    }[kind]
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
            with working(f"looking for a latency, measurement {len(self.known) + 1}"):
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
