"""How much a model suffers when one of its layers is pruned, and the sparsities by layer that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lightning_prune.core.checks import check_sparsity
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Weight
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.scopes.rankings import Local
from lightning_prune.core.types import Criterion, Granularity, Name
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.passes import Step
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.targets import Pattern

Curves = dict[Name, dict[float, float]]
"""Name -> sparsity -> what `evaluate` returned; sparsity 0 is the dense model."""
GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = GRID,
    *,
    criterion: Criterion = Magnitude(),
    granularity: Granularity = Weight(),
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
    batches: Iterable[Any] | None = None,
    forward: Step | None = None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    done: Curves | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Curves:
    """Prune one layer at a time, to each sparsity, and evaluate; afterwards the model is as it was, bit for bit.

    Li et al. 2016 (arXiv:1608.08710), section 3.2; Han et al. 2015 (arXiv:1506.02626), section 5.

    Cost: one evaluation for each layer and sparsity, and one of the dense model; the criterion's calibration once; a
        copy of one layer's weights at a time.

    When: to see which layer suffers first, and for `allocate`; layers are looked at alone, without training on.

    Args:
        model: any module.
        evaluate: model -> a number; a loss, or an accuracy.
        sparsities: each in [0, 1).
        criterion: how good each weight is; calibrated once, on the dense model.
        granularity: what goes as one piece.
        include: patterns or module types to look at, as for `prune`.
        exclude: patterns or module types to leave out.
        batches: calibration data, for criteria by activations or gradients.
        forward: as for `prune`.
        loss: as for `prune`.
        done: curves of before, which are gone on with in place: an interrupted analysis loses nothing.
        progress: runs -> the same, shown as they go by.

    Raises:
        ValueError: a sparsity out of its range, or a recipe that does not fit the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> curves = sensitivity(net, lambda m: float(m(torch.ones(1, 4))), [0.5, 0.9])
        >>> {name: list(curve) for name, curve in curves.items()}
        {'0.weight': [0.0, 0.5, 0.9], '2.weight': [0.0, 0.5, 0.9]}
    """
    for value in sparsities:
        check_sparsity("sparsities", value)
    pruner = Pruner(model, Recipe(0.0, criterion, granularity, Local(), include, exclude))
    with torch.enable_grad():
        calibrate(pruner.statistics, model, batches, forward=forward, loss=loss)
    curves = done if done is not None else {}
    scores = pruner.scores()
    if missing := [name for name in pruner.targets if 0.0 not in curves.get(name, {})]:
        dense = evaluate(model)
        for name in missing:
            curves.setdefault(name, {})[0.0] = dense
    runs = [(name, s) for name in pruner.targets for s in sparsities if s not in curves[name]]
    for name, sparsity in progress(runs):
        parameter = pruner.targets[name]
        mask = granularity.expand(Local()({name: scores[name]}, sparsity)[name], tuple(parameter.shape))
        before = parameter.detach().clone()
        try:
            parameter.masked_fill_(~mask, 0.0)
            curves[name][sparsity] = evaluate(model)
        finally:
            parameter.copy_(before)
    return {name: dict(sorted(curves[name].items())) for name in pruner.targets}


def allocate(
    curves: Mapping[Name, Mapping[float, float]],
    sizes: Mapping[Name, int],
    sparsity: float,
    *,
    largest: float = 0.99,
) -> dict[Name, float]:
    """Return the sparsities by layer whose losses add up to the least, for a sparsity over all.

    Each layer's curve is taken as its lower convex hull, and sparsity is spent where a weight costs least: the optimum
    of the sum, which is an upper bound of the whole as far as layers suffer by themselves.

    Cost: nothing beside the curves.

    When: sparsities by layer for one-shot pruning of a trained model, by `Fixed` or `sparsity={...}`.

    Args:
        curves: name -> sparsity -> loss, lower is better, as `sensitivity` returns them; accuracies with a minus.
        sizes: weights of each layer.
        sparsity: over all, in [0, 1).
        largest: in (0, 1]; points of the curves above it are left out, so that no layer passes it.

    Returns:
        Name -> sparsity, as `sparsity=` takes it; weighted by size their mean is `sparsity`.

    Raises:
        ValueError: more sparsity than the curves reach.

    Example:
        >>> curves = {"a": {0.0: 0.0, 0.5: 0.1, 0.9: 1.0}, "b": {0.0: 0.0, 0.5: 2.0, 0.9: 4.0}}
        >>> {name: round(s, 3) for name, s in allocate(curves, {"a": 100, "b": 100}, 0.25).items()}
        {'a': 0.5, 'b': 0.0}
    """
    check_sparsity("sparsity", sparsity)
    pieces = []
    for name, curve in curves.items():
        hull = _hull(sorted((s, v) for s, v in curve.items() if s <= largest))
        for (start, low), (end, high) in pairwise(hull):
            pieces.append(((high - low) / ((end - start) * sizes[name]), name, end - start))
    left = sparsity * sum(sizes.values())
    found = dict.fromkeys(curves, 0.0)
    for _, name, width in sorted(pieces, key=lambda piece: piece[0]):
        spent = min(width, left / sizes[name])
        found[name] += spent
        left -= spent * sizes[name]
    if left > 1e-6 * sum(sizes.values()):
        reached = sparsity - left / sum(sizes.values())
        raise ValueError(
            f"`sparsity` is at most what the curves reach together, {reached:.4f}, but got {sparsity}: "
            "analyse higher sparsities."
        )
    return found


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of points in ascending order."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull
