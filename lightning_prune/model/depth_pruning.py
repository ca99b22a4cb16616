"""A model and a recipe for residual blocks or branches: those that change what they add to least are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.core.allocation import floor_of, num_kept
from lightning_prune.core.granularities import Layer
from lightning_prune.core.patterns import check_match, listed, matches
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.selection import keep_top
from lightning_prune.core.types import Masks, Name
from lightning_prune.graph import Block, Plan, trace
from lightning_prune.graph.plan_data import from_data, to_data
from lightning_prune.model.calls import Call, replaying
from lightning_prune.model.influence import Influence
from lightning_prune.model.skipping import settle_blocks
from lightning_prune.model.surgery import execute_
from lightning_prune.report.progress import working


class DepthPruner:
    """The residual blocks of one model under one recipe; it has the surface of `Pruner`.

    Args:
        model: it is only read here; `shrink_` changes it.
        recipe: its granularity is `Layer`; `include` and `exclude` name blocks.
        call: an example call, which is traced; the blocks' influence is measured on it unless `statistics` has watched
            other calls.
        trained: unused; blocks go as wholes.

    Raises:
        ValueError: the model has no residual block or branch that can go, or a pattern matches none.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, call: Call, trained: Container[int] | None = None
    ) -> None:
        assert isinstance(recipe.granularity, Layer)
        self.model, self.recipe, self.granularity, self.call = model, recipe, recipe.granularity, call
        self.couplings = trace(call.module, call.args, call.kwargs, root=model)
        is_block = self.granularity.unit == "block"
        known = self.couplings.blocks if is_block else self.couplings.branches
        self.blocks = {path: known[path] for path in _selected(list(known), recipe)}
        self.num_groups = len(self.blocks)
        if not self.blocks:
            raise ValueError(
                f"`granularity` {self.granularity} leaves out residual {'blocks' if is_block else 'branches'}, but "
                f"{type(model).__name__} has none that can go: a module that runs once and "
                + (
                    "returns its input plus something, "
                    if is_block
                    else "whose output is added to the stream, "
                )
                + "in the same shape."
            )
        self.statistics = Influence(model, self.blocks, call.module)
        self.masks: Masks = {}
        self.plans: list[Plan] = []
        self.frozen: dict[str, str] = {}
        self.skipped: list[str] = []
        self.influence: dict[str, float] = {}
        self.requested = 0.0
        self.agree: Callable[[Any], Any] = lambda found: found
        self.group_shapes = dict.fromkeys(self.blocks, (1,))
        self.final_sparsity = recipe.final_sparsity(self.group_shapes)
        inside = tuple(f"{path}." for path in self.blocks)
        self.targets = {n: p for n, p in model.named_parameters() if n.startswith(inside)}
        self.shapes = {name: tuple(p.shape) for name, p in self.targets.items()}

    def forget(self) -> None:
        """Do nothing: blocks that are left out are gone."""

    @property
    def sparsity(self) -> float:
        """The fraction of blocks that is gone."""
        return len(self.skipped) / self.num_groups

    def count_groups(self, name: Name) -> tuple[int, int] | None:
        """Return 1 and whether the block of a weight is kept."""
        return 1, int(not any(name.startswith(f"{path}.") for path in self.skipped))

    def update_(self, fraction: float) -> None:
        """Choose the blocks that go, for a fraction of the final sparsity in [0, 1]."""
        self.choose_(fraction)

    def choose_(self, fraction: float) -> None:
        """Choose the blocks that go; nothing is masked."""
        self.requested = fraction * self.final_sparsity
        self.influence = self.agree(self._measured())
        self._rank()

    def _rank(self) -> None:
        count = num_kept(self.num_groups, self.requested)
        count = max(count, floor_of(self.granularity.min_keep, self.num_groups), len(self.frozen))
        ranked = [math.inf if path in self.frozen else self.influence[path] for path in self.blocks]
        mask = keep_top({"blocks": torch.tensor(ranked, dtype=torch.float64)}, count)["blocks"]
        self.skipped = [path for path, is_kept in zip(self.blocks, mask.tolist(), strict=True) if not is_kept]

    def _measured(self) -> dict[str, float]:
        if not self.statistics.influence():
            with self.statistics.watch(), replaying(self.model, self.call) as again:
                again()
        found = dict(self.statistics.influence())
        self.statistics.clear()
        return found

    def apply_(self, among: Container[int] | None = None) -> None:
        """Do nothing: blocks are not masked, they go at once."""

    def apply_to_(self, model: nn.Module) -> None:
        """Do nothing: blocks are not masked."""

    def plan(self) -> Plan:
        """Return the plan that leaves out the chosen blocks, proved equal to the model in which they add nothing.

        Blocks that cannot go are frozen, with the reason in `frozen`, and the choice is made anew among the others.
        """
        with working("comparing the smaller model with the masked one"):
            found = settle_blocks(self.couplings, self._gone, self._freeze)
        (self.skipped, error), self.frozen = self.agree((found, self.frozen))
        how = {path: block.replacement for path, block in self._gone().items()}
        groups = {path: (1, int(path not in self.skipped)) for path in self.blocks}
        return Plan(slices={}, shapes=self.couplings.shapes, replaced=how, groups=groups, error=error)

    def _gone(self) -> dict[str, Block]:
        return {path: self.blocks[path] for path in self.skipped}

    def _freeze(self, path: str, reason: str) -> None:
        self.frozen[path] = reason
        self._rank()

    def shrink_(self, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()) -> Plan:
        """Put the identity, or zeros, in the place of what was chosen; what the model does not do without stays."""
        plan = self.plan()
        if plan.is_empty:
            return plan
        execute_(self.model, plan, optimizers=optimizers, copies=copies)
        self.plans.append(plan)
        self.targets = {n: p for n, p in self.model.named_parameters() if n in self.targets}
        return plan

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen and done, safe under `torch.load(weights_only=True)`."""
        return {
            "requested": self.requested,
            "skipped": list(self.skipped),
            "influence": dict(self.influence),
            "frozen": dict(self.frozen),
            "plans": to_data(self.plans),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.requested, self.skipped = float(state["requested"]), list(state["skipped"])
        self.influence, self.frozen = dict(state["influence"]), dict(state["frozen"])
        self.plans = list(from_data(state["plans"]))


def _selected(paths: list[str], recipe: Recipe) -> list[str]:
    for argument in ("include", "exclude"):
        for pattern in getattr(recipe, argument) or ():
            if not isinstance(pattern, str):
                raise ValueError(f"`{argument}` names blocks by pattern for Layer, but got {pattern!r}.")
            if paths:
                check_match(argument, pattern, dict.fromkeys(paths))
    chosen = [p for p in paths if recipe.include is None or any(matches(i, p) for i in recipe.include)]
    kept = [path for path in chosen if not any(matches(pattern, path) for pattern in recipe.exclude)]
    if paths and not kept:
        raise ValueError(f"`include` and `exclude` leave none of the blocks {listed(paths)}.")
    return kept
