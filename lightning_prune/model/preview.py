"""What a recipe would do to a model: it is done to a copy, as far as that takes no training."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.patterns import check_match
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.regrowth import SparseRecipe
from lightning_prune.core.scopes.allocations import ERK, Fixed
from lightning_prune.core.scopes.curves import Allocated
from lightning_prune.core.scopes.patterns import NofM
from lightning_prune.core.scopes.rankings import Local, PerRow
from lightning_prune.core.types import Couples, Name
from lightning_prune.model.calls import Call
from lightning_prune.model.cost import measure
from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.regrowing import RegrowingPruner
from lightning_prune.model.shortfall import shortfall
from lightning_prune.model.shrinking import AnyPruner, pruner_of
from lightning_prune.model.targets import reasons_left_out, select_targets, unmatched
from lightning_prune.report.costs import Cost

BY_SHAPE = (Local, PerRow, ERK, Fixed, Allocated, NofM)
"""Scopes that give each layer a number that follows from shapes alone, and from what they are given."""


@dataclass
class Expected:
    """What came of a recipe on a copy of the model, as far as it got.

    Args:
        pruner: after it was done; None where the recipe does not fit.
        before: cost of the model.
        after: cost of the copy afterwards.
        left_out: name of a weight -> why it is no target.
        troubles: why it does not fit.
        notes: how far the figures are exact.
    """

    pruner: AnyPruner | None
    before: Cost
    after: Cost | None = None
    left_out: dict[Name, str] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def expect(
    model: nn.Module,
    recipe: Recipe | SparseRecipe,
    call: Call | None,
    *,
    trained: Container[int] | None = None,
    shrinks: bool = True,
    is_final: bool = False,
    check: Callable[[Pruner], object] | None = None,
) -> Expected:
    """Prune a model that is given away, and measure what is left of it.

    Args:
        model: a copy; it is changed.
        recipe: what goes, and how much.
        call: an example call of it or of a part of it; coupled granularities need one.
        trained: as for `Pruner`.
        shrinks: whether coupled granularities take out what they prune.
        is_final: whether the weights are those that will be pruned, rather than those before training.
        check: looks at the pruner of single tensors and raises a ValueError where it does not fit.
    """
    plain = recipe.plain if isinstance(recipe, SparseRecipe) else recipe
    found = Expected(None, measure(model, call, latency=False, compress=False))
    found.troubles += unmatched_patterns(model, plain)
    if isinstance(plain.granularity, Couples) and call is None:
        found.troubles.append(
            "`granularity` of coupled groups follows a call of the model, but no batch could be run through it."
        )
    if found.troubles:
        return found
    try:
        found.troubles += _misfits(model, plain, trained)
        found.left_out = _left_out(model, plain, trained)
        found.pruner = _pruned(model, recipe, call, trained, shrinks, found.notes)
        if check is not None and isinstance(found.pruner, Pruner):
            check(found.pruner)
    except ValueError as error:
        if str(error) not in found.troubles and not found.troubles:
            found.troubles.append(str(error))
        return found
    if isinstance(found.pruner, GroupPruner) and (missed := found.pruner.missed):
        found.troubles.append(missed)
    elif found.pruner is not None and (missed := shortfall(found.pruner)):
        found.notes.append(missed)
    found.after = measure(model, call, latency=False, compress=False)
    found.notes += _exactness(plain, found.pruner, is_final)
    return found


def unmatched_patterns(model: nn.Module, recipe: Recipe) -> list[str]:
    """Return what is to be said of each pattern that matches nothing, the nearest candidates with it."""
    if getattr(recipe.granularity, "unit", None):  # those name blocks, which only a trace finds
        return []
    patterns = {"include": recipe.include or (), "exclude": recipe.exclude}
    try:
        found = unmatched(model, patterns)
        names = [] if found else list(_targets(model, recipe, None))
    except ValueError as error:
        return [str(error)]
    if isinstance(recipe.scope, Fixed) and not isinstance(recipe.granularity, Couples):
        for pattern in recipe.scope.sparsities if names else ():
            try:
                check_match("sparsities", pattern, names)
            except ValueError as error:
                found.append(str(error))
    return found


def _targets(model: nn.Module, recipe: Recipe, trained: Container[int] | None) -> dict[Name, nn.Parameter]:
    return select_targets(model, include=recipe.include, exclude=recipe.exclude, trained=trained)


def _left_out(model: nn.Module, recipe: Recipe, trained: Container[int] | None) -> dict[Name, str]:
    if getattr(recipe.granularity, "unit", None):
        return {}
    return reasons_left_out(model, include=recipe.include, exclude=recipe.exclude, trained=trained)


def _misfits(model: nn.Module, recipe: Recipe, trained: Container[int] | None) -> list[str]:
    """Return what N:M says of each layer that it cannot divide; a run stops at the first."""
    if not isinstance(recipe.scope, NofM) or isinstance(recipe.granularity, Couples):
        return []
    found = []
    for name, parameter in _targets(model, recipe, trained).items():
        try:
            recipe.scope.prescribed({name: tuple(parameter.shape)})
        except ValueError as error:
            found.append(str(error))
    return found


def _pruned(
    model: nn.Module,
    recipe: Recipe | SparseRecipe,
    call: Call | None,
    trained: Container[int] | None,
    shrinks: bool,
    notes: list[str],
) -> AnyPruner:
    """Prune to the final sparsity, by magnitude where the criterion asks for data."""
    if isinstance(recipe, SparseRecipe):
        pruner: AnyPruner = RegrowingPruner(model, recipe, trained)
    else:
        pruner = pruner_of(model, recipe, call, trained)
        statistics = pruner.statistics
        if not recipe.by_influence and (statistics.activations or statistics.gradients):
            stand_in = Magnitude(p=2) if isinstance(pruner, DepthPruner) else Magnitude()
            notes.append(
                f"Which weights go, is judged by {stand_in} here; the run judges by {recipe.criterion}."
            )
            pruner = pruner_of(model, replace(recipe, criterion=stand_in), call, trained)
    if isinstance(pruner, Pruner) or not shrinks:
        pruner.update_(1.0)
        return pruner
    pruner.choose_(1.0)
    pruner.shrink_()
    return pruner


def _exactness(recipe: Recipe, pruner: AnyPruner, is_final: bool) -> list[str]:
    if isinstance(pruner, DepthPruner):
        how_many = (
            "how much is left in all, the budget decides" if recipe.budget else "how many of them go is exact"
        )
        judge = "one batch" if recipe.by_influence else "the weights as they are now"
        return [f"Which blocks go, is judged by {judge}; {how_many}."]
    if is_final and recipe.criterion == Magnitude():
        return ["The figures are exact: the weights are those that will be pruned."]
    if isinstance(recipe.scope, BY_SHAPE):
        return ["The figures are exact: this scope goes by the shapes of layers."]
    if isinstance(pruner, GroupPruner):
        what = (
            "how much is left in all, the budget decides"
            if recipe.budget
            else "how many in all, but for rounding, not"
        )
        return [f"How many channels of each layer go, is estimated by the weights as they are now; {what}."]
    return [
        "How many weights of each layer go, is estimated by the weights as they are now; how many of all is exact."
    ]
