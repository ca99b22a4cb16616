"""A model and a recipe for residual blocks or branches: those that change what they add to least are left out.

Or those whose weights have the lowest scores, where the recipe has a criterion of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.core.allocation import floor_of, num_kept
from lightning_prune.core.budgets import Budget
from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.granularities import Layer, Weight
from lightning_prune.core.patterns import check_match, listed, listed_reasons, matches
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.scoring import group_scores
from lightning_prune.core.selection import keep_top
from lightning_prune.core.types import Masks, Name
from lightning_prune.graph import Block, Plan, trace
from lightning_prune.graph.plan_data import from_data, to_data
from lightning_prune.model.averages import Copies, Verdict
from lightning_prune.model.block_budget import CostWithout, check_depth_reach, cost_without, solve_depth
from lightning_prune.model.block_scores import score_blocks, scored_in
from lightning_prune.model.calls import Call, replaying
from lightning_prune.model.influence import Influence
from lightning_prune.model.joint_calls import parts_of
from lightning_prune.model.skipping import settle_blocks
from lightning_prune.model.statistics import Statistics
from lightning_prune.model.surgery import execute_
from lightning_prune.model.targets import output_dims
from lightning_prune.report.progress import working


class DepthPruner:
    """The residual blocks of one model under one recipe; it has the surface of `Pruner`.

    Args:
        model: it is only read here; `shrink_` changes it.
        recipe: its granularity is `Layer`; `include` and `exclude` name blocks.
        call: an example call, which is traced; the blocks' influence is measured on it unless `statistics` has watched
            other calls. Other criteria than the default read `statistics` of the blocks' weights.
        trained: unused; blocks go as wholes.

    Raises:
        ValueError: the model has no residual block or branch that can go, a pattern matches none, or a budget is out of
            reach.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, call: Call, trained: Container[int] | None = None
    ) -> None:
        assert isinstance(recipe.granularity, Layer)
        self.model, self.recipe, self.granularity, self.call = model, recipe, recipe.granularity, call
        self.couplings = trace(call.module, call.args, call.kwargs, root=model, training=call.is_training)
        self.blocks = self._known_blocks()
        self.num_groups = len(self.blocks)
        self.scored = {} if recipe.by_influence else scored_in(model, self.blocks)
        self.statistics = (
            Influence(model, self.blocks, parts_of(call.module))
            if recipe.by_influence
            else Statistics(model, self.scored, required_statistics(recipe.criterion))
        )
        self.masks: Masks = {}
        self.plans: list[Plan] = []
        self.frozen: dict[str, str] = {}
        self.skipped: list[str] = []
        self.num_solved = 0
        self.scores: dict[str, float] = {}
        """Of each block, higher is kept: its influence, or what its weights' scores come to."""
        self.fraction = 0.0
        self.agree: Callable[[Any], Any] = lambda found: found
        self.cost: CostWithout | None = None
        self.copies = Copies(model, self.couplings, call.ran, recipe.exclude)
        if recipe.budget is not None:
            self.couplings.followed = self.copies.names(Verdict.OPEN, Verdict.STAYS)
            self.cost = cost_without(recipe.budget, self.couplings, self.blocks, call)
            check_depth_reach(recipe.budget, self.cost, list(self.blocks), self._most)
        inside = tuple(f"{path}." for path in self.blocks)
        self.targets = {n: p for n, p in model.named_parameters() if n.startswith(inside)}
        self.shapes = {name: tuple(p.shape) for name, p in self.targets.items()}

    def _known_blocks(self) -> dict[str, Block]:
        """Return the residual blocks or branches that the recipe names, by path.

        Raises:
            ValueError: there are none.
        """
        is_block = self.granularity.unit == "block"
        known, others = self.couplings.blocks, self.couplings.branches
        if not is_block:
            known, others = others, known
        if found := {path: known[path] for path in _selected(list(known), self.recipe)}:
            return found
        what, how = (
            ("blocks", "that returns its input plus something")
            if is_block
            else ("branches", "whose output is added to the stream")
        )
        other = "branch" if is_block else "block"
        advice = f' Layer(unit="{other}") finds {listed(others, num_shown=5)}.' if others else ""
        raise ValueError(
            f"`granularity` {self.granularity} leaves out residual {what}, but {type(self.model).__name__} has none "
            f"that can go: a module {how}, in the same shape, and does not run again on what it has returned."
            f"{advice}"
        )

    def forget(self) -> None:
        """Do nothing: blocks that are left out are gone."""

    @property
    def sparsity(self) -> float:
        """The fraction of blocks that is gone."""
        return len(self.skipped) / self.num_groups

    def count_groups(self, name: Name) -> tuple[int, int] | None:
        """Return 1 and whether the block of a weight is kept."""
        return 1, int(not any(name.startswith(f"{path}.") for path in self.skipped))

    @property
    def final_sparsity(self) -> float:
        """The fraction of blocks that goes in the end; with a budget it is known after the first update."""
        if self.recipe.budget is None:
            return self.recipe.final_sparsity(dict.fromkeys(self.blocks, (1,)))
        return self.num_solved / self.num_groups

    @property
    def requested(self) -> float:
        """The fraction of blocks that is to be gone by now."""
        return self.fraction * self.final_sparsity

    @property
    def num_requested(self) -> int:
        """How many blocks are to be gone by now."""
        return self.num_groups - num_kept(self.num_groups, self.requested)

    @property
    def said_of_frozen(self) -> str:
        """Which blocks cannot go and why, to follow another sentence; nothing where all can."""
        return f" What stays: {listed_reasons(self.frozen)}." if self.frozen else ""

    @property
    def _most(self) -> int:
        """How many blocks may go."""
        return self.num_groups - max(floor_of(self.granularity.min_keep, self.num_groups), len(self.frozen))

    def update_(self, fraction: float) -> None:
        """Choose the blocks that go, for a fraction of the final sparsity in [0, 1]."""
        self.choose_(fraction)

    def choose_(self, fraction: float) -> None:
        """Choose the blocks that go; nothing is masked.

        Raises:
            ValueError: a budget is out of reach in the order in which the blocks are ranked.
        """
        self.fraction = fraction
        self.couplings.followed = self.copies.names()
        self.scores = self.agree(self._measured())
        if self.recipe.budget is not None and self.recipe.budget.kind == "latency":
            settle_blocks(self.couplings, self.call, self._all_that_may_go, self.frozen.__setitem__)
        self._rank()
        self.skipped, self.num_solved, self.frozen = self.agree((self.skipped, self.num_solved, self.frozen))

    def _all_that_may_go(self) -> dict[str, Block]:
        return self._blocks(self._lowest(self._most))

    def _rank(self) -> None:
        budget, cost = self.recipe.budget, self.cost
        if budget is not None and cost is not None:
            self.num_solved = self._solved(budget, cost)
        self.skipped = self._lowest(min(self.num_requested, self._most))

    def _solved(self, budget: Budget, cost: CostWithout) -> int:
        try:
            return solve_depth(budget, lambda num: cost(self._lowest(num)), self._most)
        except ValueError as error:
            raise ValueError(f"{error}{self.said_of_frozen}") from error

    def _lowest(self, num: int) -> list[str]:
        """Return the blocks of which there are so many that rank lowest, in the order of the model."""
        ranked = [math.inf if path in self.frozen else self.scores[path] for path in self.blocks]
        found = {"blocks": torch.tensor(ranked, dtype=torch.float64)}
        mask = keep_top(found, self.num_groups - num)["blocks"]
        return [path for path, is_kept in zip(self.blocks, mask.tolist(), strict=True) if not is_kept]

    def _measured(self) -> dict[str, float]:
        found = self._influence() if isinstance(self.statistics, Influence) else self._reduced()
        self.statistics.clear()
        return found

    def _influence(self) -> dict[str, float]:
        assert isinstance(self.statistics, Influence)
        if not self.statistics.influence():
            with self.statistics.watch(), replaying(self.model, self.call) as again:
                again()
        return dict(self.statistics.influence())

    def _reduced(self) -> dict[str, float]:
        criterion, shapes = self.recipe.criterion, {name: tuple(p.shape) for name, p in self.scored.items()}
        weights = group_scores(self.statistics.read(), shapes, criterion=criterion, granularity=Weight())
        dims = output_dims(self.model) if getattr(criterion, "per_output", False) else None
        return score_blocks(self.blocks, weights, self.granularity.reduction, dims)

    def apply_(self, among: Container[int] | None = None) -> None:
        """Do nothing: blocks are not masked, they go at once."""

    def apply_to_(self, model: nn.Module) -> None:
        """Do nothing: blocks are not masked."""

    def plan(self) -> Plan:
        """Return the plan that leaves out the chosen blocks, proved equal to the model in which they add nothing.

        Blocks that cannot go are frozen, with the reason in `frozen`, and the choice is made anew among the others.

        Raises:
            ValueError: a budget is out of reach of those.
        """
        with working("comparing the smaller model with the masked one"):
            found = settle_blocks(self.couplings, self.call, lambda: self._blocks(self.skipped), self._freeze)
        (self.skipped, error), self.num_solved, self.frozen = self.agree(
            (found, self.num_solved, self.frozen)
        )
        how = {path: block.replacement for path, block in self._blocks(self.skipped).items()}
        groups = {path: (1, int(path not in self.skipped)) for path in self.blocks}
        return Plan(slices={}, shapes=self.couplings.shapes, replaced=how, groups=groups, error=error)

    def _blocks(self, paths: Iterable[str]) -> dict[str, Block]:
        return {path: self.blocks[path] for path in paths}

    def _freeze(self, path: str, reason: str) -> None:
        self.frozen[path] = reason
        self._rank()

    def shrink_(self, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()) -> Plan:
        """Put the identity, or zeros, in the place of what was chosen; what the model does not do without stays."""
        plan = self.plan()
        if plan.is_empty:
            return plan
        plan = self.copies.joined(plan)
        execute_(self.model, plan, optimizers=optimizers, copies=copies)
        self.plans.append(plan)
        self.targets = {n: p for n, p in self.model.named_parameters() if n in self.targets}
        return plan

    def follow_(self, plan: Plan) -> None:
        """Go on with the smaller model once someone else has carried out a plan: blocks stay where they are."""
        self.targets = {n: p for n, p in self.model.named_parameters() if n in self.targets}

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen and done, safe under `torch.load(weights_only=True)`."""
        return {
            "fraction": self.fraction,
            "num_solved": self.num_solved,
            "skipped": list(self.skipped),
            "scores": dict(self.scores),
            "frozen": dict(self.frozen),
            "plans": to_data(self.plans),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.fraction, self.num_solved = float(state["fraction"]), int(state["num_solved"])
        self.skipped = list(state["skipped"])
        self.scores, self.frozen = dict(state["scores"]), dict(state["frozen"])
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
