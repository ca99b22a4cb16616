"""What it costs to keep so many indices: counted on the couplings, or measured on a smaller copy."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from lightning_prune.core.budgets import Budget
from lightning_prune.graph import Couplings, Plan
from lightning_prune.model.calls import Call, replaying, tensors_of
from lightning_prune.model.copies import copied
from lightning_prune.model.joint_calls import joined, parts_of
from lightning_prune.model.latency import latency_ratio
from lightning_prune.model.surgery import execute_
from lightning_prune.report.progress import working
from lightning_prune.report.storage import write_text

Counts: TypeAlias = dict[str, int]
"""Group name -> how many indices it keeps."""
CostOf: TypeAlias = Callable[[Counts], float]
"""Counts -> the cost as a fraction of the dense model's; it falls with them."""


def cost_function(
    budget: Budget, couplings: Couplings, call: Call, spent: float = 1.0, measured: Measured | None = None
) -> CostOf:
    """Return what computes the cost that a budget limits, as a fraction of the dense model's.

    Args:
        budget: says which cost.
        couplings: of the model as it is now.
        call: the example call, whose latency is measured.
        spent: what the model as it is now costs, as a fraction of the dense one's; below 1 where it was cut before.
        measured: latencies of before, and those of now.
    """
    if budget.kind == "latency":
        known, groups = Measured() if measured is None else measured, couplings.groups

        def plan(counts: Counts) -> Plan:
            """Keep the first indices: which are kept makes no difference to the time."""
            return couplings.plan({n: torch.arange(groups[n].size) < kept for n, kept in counts.items()})

        sizes = {name: group.size for name, group in groups.items()}
        return LatencyOf(couplings, call, known, precision=budget.tolerance / 2, sizes=sizes, plan=plan)
    return counted(budget.kind, couplings, spent)


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


class LatencyOf:
    """Measures a smaller copy against the dense model, in turns; the same counts are measured once.

    Args:
        couplings: of the dense model.
        call: what is measured.
        measured: what is known by now.
        precision: of the ratio, relative to the dense model's time.
        sizes: of the groups.
        plan: counts -> what makes the copy small.
    """

    def __init__(
        self,
        couplings: Couplings,
        call: Call,
        measured: Measured,
        *,
        precision: float,
        sizes: Counts,
        plan: Callable[[Counts], Plan],
    ) -> None:
        self.couplings, self.call, self.measured, self.precision = couplings, call, measured, precision
        self.sizes, self.plan = sizes, plan
        self.place = _place(couplings, call)

    def __call__(self, counts: Counts) -> float:
        if all(self.sizes[name] == kept for name, kept in counts.items()):
            return 1.0
        if (known := self.measured.get(self.place, counts)) is not None:
            return known
        with working(f"looking for a latency, measurement {len(self.measured) + 1}"):
            return self.measured.note(self.place, counts, self._measured(counts))

    def _measured(self, counts: Counts) -> float:
        root = self.couplings.run.root
        small_root = copied(root)
        execute_(small_root, self.plan(counts))
        paths = self.couplings.run.paths
        small_parts = [small_root.get_submodule(paths[part]) for part in parts_of(self.call.module)]
        small = replace(self.call, module=joined(small_parts))
        with replaying(root, self.call) as dense_call, replaying(small_root, small) as small_call:
            return latency_ratio(dense_call, small_call, precision=self.precision)


class Measured:
    """Latencies that were measured, in memory or also in a file, from which a search that was interrupted goes on.

    Args:
        path: of the file; None for memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, float] = {}
        if path is not None and path.is_file():
            self._known = _numbers_in(path.read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, place: str, counts: Counts) -> float | None:
        """Return what was measured for the same model, call and machine, if anything was."""
        return self._known.get(f"{place} {json.dumps(counts, sort_keys=True)}")

    def note(self, place: str, counts: Counts, cost: float) -> float:
        """Write down a measurement, and return it."""
        self._known[f"{place} {json.dumps(counts, sort_keys=True)}"] = cost
        if self.path is not None:
            write_text(self.path, json.dumps(self._known, indent=1) + "\n")
        return cost

    def forget(self) -> None:
        """Forget all, once the search is over: a later one measures anew."""
        self._known = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _numbers_in(text: str) -> dict[str, float]:
    """Return the numbers by name of a JSON text; of one that is damaged none, and all is measured anew."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    named = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in named if isinstance(value, float)}


def _place(couplings: Couplings, call: Call) -> str:
    """Return what a latency depends on besides the counts: the model's shapes, what it is called on, the machine."""
    shapes = {name: tuple(value.shape) for name, value in couplings.run.root.state_dict().items()}
    seen = [(str(x.dtype), tuple(x.shape)) for x in tensors_of((call.args, dict(call.kwargs)))]
    words = [shapes, seen, str(call.device), torch.__version__, platform.node(), platform.processor()]
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]
