"""Which indices of a model's coupled groups go: by their scores, and by what the model's code can follow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from typing import Any

from torch import Tensor, nn

from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.granularities import Weight
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.scoring import group_scores
from lightning_prune.core.types import GroupScores, Name
from lightning_prune.graph import Choice, Plan, Unsolvable, trace
from lightning_prune.model.averages import Copies, Verdict
from lightning_prune.model.budget import out_of_reach
from lightning_prune.model.calls import Call
from lightning_prune.model.contest import Contest
from lightning_prune.model.equivalence import settle
from lightning_prune.model.grouping import without
from lightning_prune.model.history import plans_of
from lightning_prune.model.nothing import nothing_found
from lightning_prune.model.prices import Counts
from lightning_prune.model.statistics import Statistics
from lightning_prune.model.targets import check_values, output_dims, select_targets, spared_outputs
from lightning_prune.report.progress import working


class GroupChoice:
    """What is chosen among one model's coupled groups under one recipe; no weight is changed.

    Args:
        model: it is only read.
        recipe: what is pruned, and how much of it in the end; its granularity is `Channel` or `Head`.
        call: an example call of the model or of a part of it, which is traced.
        trained: as for `Pruner`.

    Raises:
        ValueError: the recipe does not fit the model, or it has no group that can be pruned.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, call: Call, trained: Container[int] | None = None
    ) -> None:
        self.model, self.recipe, self.call = model, recipe, call
        scored = select_targets(model, include=recipe.include, exclude=recipe.exclude, trained=trained)
        check_values(scored)
        self.scored = {name: tuple(parameter.shape) for name, parameter in scored.items()}
        self.couplings = trace(call.module, call.args, call.kwargs, root=model, training=call.is_training)
        dims = output_dims(model) if getattr(recipe.criterion, "per_output", False) else None
        spared = spared_outputs(
            model, scored, include=recipe.include, exclude=recipe.exclude, trained=trained
        )
        self.contest = Contest(recipe, self.couplings, call, self.scored, spared, dims)
        if dims is not None:  # what writes no channel that is pruned needs no score
            self.scored = {name: shape for name, shape in self.scored.items() if name in self._outputs()}
        self.statistics = Statistics(
            model, {name: scored[name] for name in self.scored}, required_statistics(recipe.criterion)
        )
        self.outputs = self._outputs()
        self.frozen: dict[str, str] = {}
        self.choice: dict[str, Tensor] = {}
        self.fraction = 0.0
        self.agree: Callable[[Any], Any] = lambda found: found
        """What one process has found -> what all go by; each is asked at the same points."""
        self.copies = Copies(model, self.couplings, call.ran, recipe.exclude)
        self._scores: GroupScores | None = None
        self._refresh()
        if not plans_of(model):  # of one that was cut, a checkpoint may know of groups that are none any more
            self._check_not_empty()
            self.check_reach(Verdict.OPEN, Verdict.STAYS)  # any of them may turn out to follow

    def count_copies_(self, *also: Verdict) -> None:
        """Let a budget count what follows in the sizes of what it is a copy of, and what other verdicts say of."""
        self.couplings.followed = self.copies.names(*also)

    def check_reach(self, *also: Verdict) -> None:
        """Refuse what not even the smallest model reaches, though the copies of these verdicts became smaller, too.

        Raises:
            ValueError: as for `Contest.check_reach`.
        """
        self.count_copies_(*also)
        self.contest.check_reach()

    def _check_not_empty(self) -> None:
        if not self.contest.sizes:
            raise ValueError(nothing_found(self.model, self.contest, self.frozen))

    def check_latency(self) -> None:
        """Refuse a latency that not even the smallest model has, before it is trained for; it takes some seconds.

        Raises:
            ValueError: it names the nearest latency.
        """
        if (budget := self.recipe.budget) is None or budget.kind != "latency":
            return
        self._drop_what_cannot_follow(self.contest.any_scores())
        least = self.agree(self.contest.least_latency())
        if least is not None and least > budget.fraction + budget.tolerance:
            self.contest.measured.forget()
            raise out_of_reach(budget, least)

    def _drop_what_cannot_follow(self, scores: GroupScores) -> None:
        """See what half of the indices can go without: what runs, can be timed."""
        settle(self.couplings, lambda: self.contest.halve(scores), freeze=self._drop)
        self._check_not_empty()

    def _refresh(self) -> None:
        """Find the parameters that the groups reach."""
        reached = {m.tensor for g in self.contest.groups.values() for m in g.members if m.is_parameter}
        self.targets: dict[Name, nn.Parameter] = {
            name: parameter for name, parameter in self.model.named_parameters() if name in reached
        }
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.targets.items()}

    def _outputs(self) -> dict[Name, str]:
        """Return the group that each weight's outputs belong to."""
        dims = output_dims(self.model)
        return {
            member.tensor: name
            for name, group in self.contest.groups.items()
            for member in group.members
            if member.dim in dims.get(member.tensor, {0})
        }

    @property
    def num_groups(self) -> int:
        """The number of indices of all groups, before anything was cut."""
        return sum(self.contest.sizes.values())

    @property
    def final_sparsity(self) -> float:
        """The fraction of all indices that goes in the end; with a budget it is known after the first update."""
        return self.contest.final_sparsity

    @property
    def requested(self) -> float:
        """The fraction of all indices that is to be gone by now."""
        return self.fraction * self.final_sparsity

    @property
    def sparsity(self) -> float:
        """The fraction of all indices that is masked or gone."""
        return self.contest.sparsity(self.choice)

    def count_groups(self, name: Name) -> tuple[int, int] | None:
        """Return how many outputs a weight had and how many it keeps; None where they are not pruned."""
        group = self.outputs.get(name)
        if group not in self.contest.sizes:
            return None
        return self.contest.sizes[group], self.contest.counts(self.choice)[group]

    def choose_(self, fraction: float) -> None:
        """Choose anew as `update_` does, but change no weight yet."""
        self._check_not_empty()
        self.count_copies_(*(() if fraction >= 1.0 else (Verdict.OPEN,)))
        weights = group_scores(
            self.statistics.read(), self.scored, criterion=self.recipe.criterion, granularity=Weight()
        )
        scores = self.contest.scores(weights)
        self._scores = without(scores, self.choice) if fraction >= self.fraction else scores
        self.fraction = fraction
        self._choose()
        self.statistics.clear()

    def _choose(self) -> None:
        assert self._scores is not None
        scores, budget = self._scores, self.recipe.budget
        if budget is not None and budget.kind == "latency" and self.contest.solved is None:
            self._drop_what_cannot_follow(scores)
        while True:
            choice, solved, guilty = self.agree(self._contested(scores))
            if not guilty:
                self.choice, self.contest.solved = choice, solved
                return
            for name, reason in guilty.items():
                self._drop([name], reason)
            self._check_not_empty()

    def _contested(self, scores: GroupScores) -> tuple[Choice, Counts | None, dict[str, str]]:
        """Return what wins and the numbers solved for, or which groups could not follow where it was measured."""
        try:
            choice = self.contest.choose(scores, self.fraction) if self.fraction else {}
        except Unsolvable as unsolvable:
            if not unsolvable.groups:
                raise
            return {}, None, dict.fromkeys(unsolvable.groups, unsolvable.reason)
        return choice, self.contest.solved, {}

    def plan(self) -> Plan:
        """Return the plan that makes the present choice real, proved equal to the masked model.

        Groups that cannot follow are frozen, with the reason in `frozen`, and keep all; the others compete anew.

        Raises:
            ValueError: nothing is left to prune, or a budget is out of reach of what is left.
        """
        with working("comparing the smaller model with the masked one"):
            found = settle(self.couplings, self._kept, freeze=self._drop)
        self.choice, plan, self.frozen = self.agree((dict(found[0]), found[1], self.frozen))
        self._drop([name for name in self.frozen if name in self.couplings.groups], "frozen before")
        assert isinstance(plan, Plan)
        return plan

    def _kept(self) -> Choice:
        """Return the choice, made anew among the groups that are left where some have just been frozen."""
        if not self.choice.keys() <= self.contest.sizes.keys():
            self._check_not_empty()
            if self._scores is None:
                self.choice = {name: m for name, m in self.choice.items() if name in self.contest.sizes}
            else:
                self.choice = self.contest.choose(self._scores, self.fraction)
        return self.choice

    def leave_whole_(self, names: Collection[str], reason: str) -> None:
        """Leave out groups that nothing must be taken from.

        Raises:
            ValueError: nothing is left to prune.
        """
        self._drop(names, reason)
        self._check_not_empty()

    def _drop(self, names: Collection[str], reason: str) -> None:
        """Leave out groups that cannot follow."""
        self.couplings.freeze([name for name in names if name in self.couplings.groups], reason)
        self.frozen = dict.fromkeys(names, reason) | self.frozen
        self.contest.drop(names)
        self._refresh()

    @property
    def missed(self) -> str | None:
        """How far from the budget the model is, where that is more than its tolerance."""
        return self.contest.missed(self.choice)
