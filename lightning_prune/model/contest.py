"""The contest among a model's coupled groups: how many indices each keeps, and which, also after some were cut."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune.core.budgets import Budget
from lightning_prune.core.granularities import Channel, Head
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import Checks, GroupScores, Name, Scores
from lightning_prune.graph import Couplings, Unsolvable
from lightning_prune.model.budget import out_of_reach, solve
from lightning_prune.model.calls import Call
from lightning_prune.model.grouping import (
    allowed,
    candidates,
    count,
    counts_of,
    keep,
    score_groups,
    sparsity_of_counts,
)
from lightning_prune.model.prices import Counts, Measured, cost_function, counted

NEVER_GOES = 1e30
"""The score of what is left of groups that are seen no more: above all others, and a sum of such is a number yet."""


class Contest:
    """Groups compete in the sizes that they had before anything was cut.

    What was cut ranks last, as what is masked does: so a model that shrinks with each update loses the same channels as
    one that is only masked, and `min_keep`, `multiple_of` and a budget mean fractions and multiples of the dense model.

    Args:
        recipe: what goes, and how much; its granularity is `Channel` or `Head`.
        couplings: of the model.
        call: the example call, whose latency a budget may limit.
        scored: parameters that have scores.
        protected: parameters whose outputs stay, and the dims of these.
        dims: along which scores count, by parameter; all by default.
    """

    def __init__(
        self,
        recipe: Recipe,
        couplings: Couplings,
        call: Call,
        scored: Collection[Name],
        protected: Mapping[Name, Collection[int]],
        dims: Mapping[Name, Collection[int]] | None = None,
    ) -> None:
        assert isinstance(recipe.granularity, (Channel, Head))
        self.recipe, self.granularity, self.call, self.protected = recipe, recipe.granularity, call, protected
        self.couplings, self.scored, self.dims = couplings, scored, dims
        self.groups = candidates(couplings, self.granularity, scored, protected, dims)
        self.sizes = {name: group.size for name, group in self.groups.items()}
        self.kinds = {name: group.kind for name, group in self.groups.items()}
        self.spent = 1.0
        self.left: dict[Name, int] = {}
        """What was left of groups that the smaller model no longer shows; of others that it does not, one index."""
        self.solved: Counts | None = None
        self.measured = Measured()

    def check_reach(self) -> None:
        """Refuse what not even the smallest model reaches, or what the scope cannot; a latency is seen when measured.

        Raises:
            ValueError: a budget below what is left when all groups keep the least that they may, too much sparsity, or
                names that match none.
        """
        budget, scope = self.recipe.budget, self.recipe.scope
        if budget is None:
            final = self.final_sparsity  # a scope that goes by names sees to it that there are such
            if isinstance(scope, Checks):
                nothing = {name: torch.zeros(size) for name, size in self.sizes.items()}
                scope.check(GroupScores(nothing, self.kinds), final)
        elif budget.kind != "latency":
            cost = counted(budget.kind, self.couplings, self.spent)(self._least())
            if cost > budget.fraction + budget.tolerance:
                raise out_of_reach(budget, cost)

    def least_latency(self) -> float | None:
        """Return what the smallest model takes, in dense models' times; None if it cannot be built."""
        assert self.recipe.budget is not None
        try:
            return cost_function(self.recipe.budget, self.couplings, self.call, self.spent, self.measured)(
                self._least()
            )
        except Unsolvable:
            return None

    def any_scores(self) -> GroupScores:
        """Return scores by which the last indices are the best, alike in all groups."""
        found = {name: torch.arange(size).double() / size for name, size in self.sizes.items()}
        return GroupScores(found, self.kinds)

    def _least(self) -> Counts:
        return {name: allowed(0, size, self.granularity) for name, size in self.sizes.items()}

    def follow(
        self, couplings: Couplings, spent: float, scored: Collection[Name], left: Mapping[Name, int]
    ) -> None:
        """Go on with the smaller model.

        Args:
            couplings: of it.
            spent: what it costs, as a fraction of the dense model's.
            scored: its parameters that have scores.
            left: how many indices of groups are left.
        """
        self.couplings, self.spent, self.scored = couplings, spent, scored
        found = candidates(couplings, self.granularity, scored, self.protected, self.dims)
        self.groups = {name: found[name] for name in self.sizes if name in found}
        self.left = {name: left[name] for name in self.sizes if name not in found and left.get(name, 1) > 1}

    def drop(self, names: Iterable[str]) -> None:
        """Leave out groups that cannot follow; numbers that were solved for with them are solved for anew."""
        for name in names:
            if self.sizes.pop(name, None) is not None:
                self.groups.pop(name, None)
                self.solved = None

    @property
    def final_sparsity(self) -> float:
        """The fraction of all indices that goes in the end; with a budget, as far as it is known."""
        if self.recipe.budget is None:
            return self.recipe.final_sparsity({name: (size,) for name, size in self.sizes.items()})
        return sparsity_of_counts(self.solved, self.sizes) if self.solved is not None else 0.0

    def counts(self, choice: Mapping[str, Tensor]) -> Counts:
        """Return how many indices each group keeps; one that was cut down to a single index is no group any more."""
        present = {
            name: self.groups[name].size if name in self.groups else self.left.get(name, 1)
            for name in self.sizes
        }
        return present | {name: kept for name, kept in counts_of(choice).items() if name in present}

    def sparsity(self, choice: Mapping[str, Tensor]) -> float:
        """Return the fraction of all indices that is masked or gone."""
        return sparsity_of_counts(self.counts(choice), self.sizes)

    def scores(self, weights: Scores) -> GroupScores:
        """Return scores (size before anything was cut,) of each group, from those of weights."""
        found = score_groups(self.groups, weights, self.granularity, self.sizes, self.dims)
        for name in self.sizes.keys() - found.keys():
            found[name] = torch.full((self.sizes[name],), -math.inf, dtype=torch.float64)
            found[name][: self.left.get(name, 1)] = NEVER_GOES
        return GroupScores({name: found[name] for name in self.sizes}, self.kinds)

    def halve(self, scores: GroupScores) -> dict[str, Tensor]:
        """Return a choice that keeps about half, whatever the recipe says: to try what can follow."""
        scores = GroupScores({name: scores[name] for name in self.sizes}, self.kinds)
        return {
            name: mask[: self.groups[name].size]
            for name, mask in keep(scores, self._at(scores, 0.5)).items()
            if name in self.groups
        }

    def choose(self, scores: GroupScores, fraction: float) -> dict[str, Tensor]:
        """Return what is kept for a fraction of the final sparsity: group name -> bool (size now,)."""
        scores = GroupScores({name: scores[name] for name in self.sizes}, self.kinds)
        kept = keep(scores, self._count(scores, fraction))
        return {name: kept[name][: group.size] for name, group in self.groups.items()}

    def _count(self, scores: GroupScores, fraction: float) -> Counts:
        budget = self.recipe.budget
        if budget is None:
            return self._at(scores, fraction * self.final_sparsity)
        if budget.kind != "latency" or self.solved is None:
            self.solved = self._solve(scores, budget)
        if fraction >= 1.0:
            return self.solved
        counts = self._at(scores, fraction * self.final_sparsity)  # what will be needed must not go before
        return {name: max(kept, self.solved[name]) for name, kept in counts.items()}

    def _at(self, scores: GroupScores, sparsity: float) -> Counts:
        ties = self.couplings.ties
        return count(scores, sparsity, granularity=self.granularity, scope=self.recipe.scope, ties=ties)

    def _solve(self, scores: GroupScores, budget: Budget) -> Counts:
        """Return the numbers that the budget allows; those of before where scores have moved so that none fit."""
        present = {name: int((found > -math.inf).sum()) for name, found in scores.items()}
        price = cost_function(budget, self.couplings, self.call, self.spent, self.measured)

        def left(counts: Counts) -> Counts:
            """What is gone stays gone, however many a choice asks for."""
            return {name: min(kept, present[name]) for name, kept in counts.items()}

        try:
            found = solve(
                budget,
                scores,
                lambda counts: price(left(counts)),
                granularity=self.granularity,
                scope=self.recipe.scope,
                ties=self.couplings.ties,
                guide=counted("macs", self.couplings) if budget.kind == "latency" else None,
            )
        except ValueError:
            if self.solved is None:
                self.measured.forget()
                raise
            return self.solved
        return left(found)

    def cost(self, choice: Mapping[str, Tensor]) -> float:
        """Return what the model costs without what a choice removes, in the terms of the budget, 1.0 being dense.

        A latency is not measured here: it is 1.0, as it is without a budget.
        """
        budget = self.recipe.budget
        if budget is None or budget.kind == "latency":
            return 1.0
        return counted(budget.kind, self.couplings, self.spent)(counts_of(choice))

    def missed(self, choice: Mapping[str, Tensor]) -> str | None:
        """Say how far from the budget a choice is, where that is more than its tolerance; None for a latency."""
        budget, cost = self.recipe.budget, self.cost(choice)
        if budget is None or budget.kind == "latency" or abs(cost - budget.fraction) <= budget.tolerance:
            return None
        return f"{budget} is missed: {budget.kind} are {cost:.3f} of the dense model's."

    def state_dict(self) -> dict[str, Any]:
        """Return sizes, what is spent and what was solved for, safe under `weights_only=True`."""
        return {
            "sizes": dict(self.sizes),
            "kinds": dict(self.kinds),
            "spent": self.spent,
            "solved": self.solved,
            "left": dict(self.left),
        }

    def load_state_dict(self, state: Mapping[str, Any], cut: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: of a checkpoint.
            cut: the sizes of the groups that were cut, before that.

        Raises:
            ValueError: a group has another size than it had in this model.
        """
        for name, size in state["sizes"].items():
            if size != (had := cut.get(name, self.sizes.get(name, 0))):
                raise ValueError(
                    f"`sizes` of the checkpoint has {had} for the group `{name}`, but got {size}."
                )
        self.sizes, self.kinds = dict(state["sizes"]), dict(state["kinds"])
        self.follow(self.couplings, float(state["spent"]), self.scored, state.get("left", {}))
        self.solved = state["solved"]
