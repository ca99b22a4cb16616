"""A model and a recipe for coupled groups: they are scored, masked, and in the end taken out for real."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.granularities import Channel, Head, Weight
from lightning_prune.core.masks import PackedMask, group_scores, pack, unpack
from lightning_prune.core.patterns import listed
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import GroupScores, Masks, Name
from lightning_prune.graph import Choice, Plan, trace
from lightning_prune.graph.plan_data import from_data, to_data
from lightning_prune.model.apply import apply_masks_
from lightning_prune.model.budget import cost_function, solve
from lightning_prune.model.calls import Call
from lightning_prune.model.equivalence import settle
from lightning_prune.model.grouping import (
    candidates,
    choose,
    counts_of,
    overall_sparsity,
    score_groups,
    without,
)
from lightning_prune.model.statistics import Statistics
from lightning_prune.model.surgery import execute_
from lightning_prune.model.targets import select_targets


class GroupPruner:
    """The masks of one model's coupled groups under one recipe, and the surgery that makes them real.

    It has the surface of `Pruner`; a mask covers all that a removed index reaches: weights, biases, scales of norms.

    Args:
        model: it is only read here; `update_` and `apply_` change its weights, `shrink_` its shapes.
        recipe: what is pruned, and how much of it in the end; its granularity is `Channel` or `Head`.
        call: an example call of the model or of a part of it, which is traced.
        trained: as for `Pruner`.

    Raises:
        ValueError: the recipe does not fit the model, or it has no group that can be pruned.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, call: Call, trained: Container[int] | None = None
    ) -> None:
        assert isinstance(recipe.granularity, (Channel, Head))
        self.model, self.recipe, self.granularity, self.call = model, recipe, recipe.granularity, call
        self.couplings = trace(call.module, call.args, call.kwargs, root=model)
        scored = select_targets(model, include=recipe.include, exclude=recipe.exclude, trained=trained)
        self.protected = _protected(model, recipe, scored)
        self.statistics = Statistics(model, scored, required_statistics(recipe.criterion))
        self.scored = {name: tuple(parameter.shape) for name, parameter in scored.items()}
        self.frozen: dict[str, str] = {}
        self.masks: Masks = {}
        self.choice: dict[str, Tensor] = {}
        self.plans: list[Plan] = []
        self.requested, self.achieved = 0.0, 0.0
        self.dense_sizes: dict[str, int] = {}
        self._solved: float | None = None
        self.agree: Callable[[Any], Any] = lambda found: found
        """What one process has found -> what all go by; each is asked at the same points."""
        self._refresh()
        if not self.groups:
            raise ValueError(
                f"`granularity` {self.granularity} finds nothing to prune in {type(model).__name__}. Frozen are "
                f"{listed([f'{n} ({why})' for n, why in self.couplings.frozen.items()])}."
            )

    def _refresh(self) -> None:
        """Find the groups that can be pruned, and the parameters that they reach."""
        self.groups = candidates(self.couplings, self.granularity, self.scored, self.protected)
        for name, group in self.groups.items():
            self.dense_sizes.setdefault(name, group.size)
        parameters = dict(self.model.named_parameters())
        reached = {m.tensor for g in self.groups.values() for m in g.members if m.is_parameter}
        self.targets: dict[Name, nn.Parameter] = {n: p for n, p in parameters.items() if n in reached}
        self.shapes = {name: tuple(p.shape) for name, p in self.targets.items()}
        self.group_shapes = {name: (group.size,) for name, group in self.groups.items()}

    @property
    def num_groups(self) -> int:
        """The number of indices of all groups, before anything was cut."""
        return sum(self.dense_sizes.values())

    @property
    def final_sparsity(self) -> float:
        """The fraction of all indices that goes in the end; with a budget it is known after the first update."""
        if self.recipe.budget is not None:
            return self._solved if self._solved is not None else 0.0
        return self.recipe.final_sparsity(self.group_shapes)

    def count_groups(self, name: Name) -> tuple[int, int] | None:
        """Return how many outputs a weight had and how many it keeps; None where they are not pruned."""
        for group_name, group in self.groups.items():
            if any(member.tensor == name and member.dim == 0 for member in group.members):
                kept = int(self.choice[group_name].sum()) if group_name in self.choice else group.size
                return self.dense_sizes[group_name], kept
        return None

    def update_(self, fraction: float) -> None:
        """Choose anew, for a fraction of the final sparsity in [0, 1], and mask what is to go.

        What is pruned stays pruned, unless less than before is asked for.
        """
        scores = self._scores()
        if self.recipe.budget is not None and self._solved is None:
            self._solved = overall_sparsity(self._affordable(scores))
        requested = fraction * self.final_sparsity
        if requested >= self.requested:
            scores = without(scores, self.choice)
        choice = self._chosen(scores, requested, fraction) if requested else {}
        self.choice, self._solved = self.agree((choice, self._solved))
        self.masks = self._masks()
        self.requested = requested
        self.statistics.clear()
        self.apply_()

    def _scores(self) -> GroupScores:
        weights = group_scores(
            self.statistics.read(), self.scored, criterion=self.recipe.criterion, granularity=Weight()
        )
        return score_groups(self.groups, weights, self.granularity)

    def _chosen(self, scores: GroupScores, requested: float, fraction: float) -> dict[str, Tensor]:
        if self.recipe.budget is not None and fraction >= 1.0:
            return self._affordable(scores)
        done = 1.0 - sum(len(s) for s in scores.values()) / max(self.num_groups, 1)
        return self._at(scores, max(0.0, 1.0 - (1.0 - requested) / (1.0 - done)))

    def _at(self, scores: GroupScores, sparsity: float) -> dict[str, Tensor]:
        ties = self.couplings.ties
        return choose(scores, sparsity, granularity=self.granularity, scope=self.recipe.scope, ties=ties)

    def _affordable(self, scores: GroupScores) -> dict[str, Tensor]:
        assert self.recipe.budget is not None
        return solve(
            self.recipe.budget,
            scores,
            cost_function(self.recipe.budget, self.couplings, self.call, {}),
            granularity=self.granularity,
            scope=self.recipe.scope,
            ties=self.couplings.ties,
        )

    def _masks(self) -> Masks:
        found = self.couplings.masks(self.choice)
        return {n: found[n].contiguous().to(p.device) for n, p in self.targets.items() if n in found}

    def apply_(self, among: Container[int] | None = None) -> None:
        """Set what is to go to zero, in all targets or in those whose ids are `among` the given ones."""
        names = [name for name in self.masks if among is None or id(self.targets[name]) in among]
        apply_masks_([self.targets[name] for name in names], [self.masks[name] for name in names])

    def apply_to_(self, model: nn.Module) -> None:
        """Set what is to go to zero in a copy of the model."""
        copies = dict(model.named_parameters())
        weights = [copies[name] for name in self.masks]
        apply_masks_(weights, [m.to(w.device) for m, w in zip(self.masks.values(), weights, strict=True)])

    def plan(self) -> Plan:
        """Return the plan that makes the present choice real, proved equal to the masked model.

        Groups that cannot follow are frozen, with the reason in `frozen`, and keep all.
        """

        def kept() -> Choice:
            return {name: mask for name, mask in self.choice.items() if name in self.couplings.groups}

        def note(names: Iterable[str], reason: str) -> None:
            self.frozen |= dict.fromkeys(names, reason)

        choice, plan = settle(self.couplings, kept, freeze=note)
        self.choice, agreed, self.frozen = self.agree((dict(choice), plan, self.frozen))
        self.couplings.freeze([n for n in self.frozen if n in self.couplings.groups], "frozen before")
        assert isinstance(agreed, Plan)
        return agreed

    def shrink_(self, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()) -> Plan:
        """Make the model as small as its masks say, and go on with the smaller one."""
        plan = self.plan()
        if plan.is_empty:
            self.masks = self._masks()
            return plan
        execute_(self.model, plan, optimizers=optimizers, copies=copies)
        self.statistics.cut_(self.model, plan.slices)
        self.plans.append(plan)
        self.choice, self.masks = {}, {}
        self.couplings = trace(self.call.module, self.call.args, self.call.kwargs, root=self.model)
        self.couplings.freeze([n for n in self.frozen if n in self.couplings.groups], "frozen before")
        scored = select_targets(self.model, include=self.recipe.include, exclude=self.recipe.exclude)
        self.scored = {name: tuple(p.shape) for name, p in scored.items() if name in self.scored}
        self._refresh()
        return plan

    def counts(self) -> dict[str, int]:
        """Return how many indices each group keeps."""
        return {n: g.size for n, g in self.groups.items()} | counts_of(self.choice)

    @property
    def sparsity(self) -> float:
        """The fraction of all indices that is masked or gone."""
        return 1.0 - sum(self.counts().values()) / max(self.num_groups, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the choice (packed), what was cut, progress and sums, safe under `weights_only=True`."""
        return {
            "choice": {name: pack(mask) for name, mask in self.choice.items()},
            "requested": self.requested,
            "solved": -1.0 if self._solved is None else self._solved,
            "dense_sizes": dict(self.dense_sizes),
            "frozen": dict(self.frozen),
            "plans": to_data(self.plans),
            "statistics": self.statistics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or leave all as it is.

        Raises:
            ValueError: the choice belongs to other groups.
        """
        packed: Mapping[str, PackedMask] = state["choice"]
        choice = {name: unpack(name, mask) for name, mask in packed.items()}
        wrong = [n for n, mask in choice.items() if n not in self.groups or len(mask) != self.groups[n].size]
        if wrong:
            raise ValueError(
                f"`choice` of the checkpoint belongs to the groups {listed(self.groups)}, but got some for "
                f"{listed(wrong)}: the model, `include` or `exclude` has changed."
            )
        self.plans = list(from_data(state["plans"]))
        self.couplings.freeze([n for n in state["frozen"] if n in self.couplings.groups], "frozen before")
        self.frozen, self.dense_sizes = dict(state["frozen"]), dict(state["dense_sizes"])
        self._refresh()
        self.choice = choice
        self._solved = None if state["solved"] < 0 else float(state["solved"])
        self.masks, self.requested = self._masks(), float(state["requested"])
        self.statistics.load_state_dict(state["statistics"])


def _protected(model: nn.Module, recipe: Recipe, scored: Mapping[Name, object]) -> set[Name]:
    """Return the weights whose outputs stay: those left out by `exclude`, and with `include` all others."""
    if recipe.include is None and not recipe.exclude:
        return set()
    everything = select_targets(model, include=["*"])
    if recipe.include is not None:
        return set(everything) - set(scored)
    return set(everything) - set(select_targets(model, include=["*"], exclude=recipe.exclude))
