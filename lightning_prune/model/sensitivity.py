"""How much a model suffers when one of its layers is pruned; `core.scopes.curves` makes sparsities by layer of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
        evaluate: model -> a number; a loss, or an accuracy, for which `allocate` and `Allocated` take `mode="max"`.
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
        ValueError: what is no function, a sparsity out of its range, or a recipe that does not fit the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> curves = sensitivity(net, lambda m: float(m(torch.ones(1, 4))), [0.5, 0.9])
        >>> {name: list(curve) for name, curve in curves.items()}
        {'0.weight': [0.0, 0.5, 0.9], '2.weight': [0.0, 0.5, 0.9]}
    """
    if isinstance(evaluate, nn.Module) or not callable(evaluate):
        raise ValueError(f"`evaluate` is a function of the model, but got {evaluate!r:.100}.")
    if isinstance(sparsities, str) or not isinstance(sparsities, Iterable):
        raise ValueError(f"`sparsities` are several, such as [0.5, 0.9], but got {sparsities!r}.")
    sparsities = list(sparsities)
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
