"""`prune` zeroes the weights of a model in one shot, no Trainer needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Weight
from lightning_prune.core.recipe import Recipe, checked_rounds, checked_solver
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import Criterion, Granularity, Masks, Scope, Solver
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.layerwise import check_solver, solve_
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.rounds import prune_in_rounds_
from lightning_prune.model.shortfall import shortfall
from lightning_prune.model.targets import Pattern


def prune(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    criterion: Criterion = Magnitude(),
    granularity: Granularity = Weight(),
    scope: Scope = Global(),
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
    num_rounds: int = 1,
    solver: Solver | None = None,
    blocks: str | None = None,
) -> Masks:
    """Prune a model in one shot, in place, and return the masks (True is kept).

    Args:
        model: any module.
        sparsity: fraction removed, in [0, 1); numbers by name pattern; None where the scope prescribes it.
        batches: calibration data, for criteria by activations or gradients.
        forward: (model, batch) -> anything, runs the model on one batch; by default a mapping is passed as keyword
            arguments, of a tuple or list the first entry, anything else as it is.
        loss: (model, batch) -> scalar, for criteria and solvers by gradients.
        criterion: how good each weight is.
        granularity: what goes as one piece.
        scope: who competes with whom.
        include: patterns or module types to prune; by default linear, convolution and attention weights.
        exclude: patterns or module types to leave out.
        num_rounds: in how many rounds density falls to its end, by the same factor in each, with statistics of what the
            round before has left; at least 1.
        solver: how the weights that stay make up for those that go, layer by layer; it needs `batches`.
        blocks: for a solver, path of the module whose children run one after the other, as decoder layers do; by
            default the longest such chain, and without one each layer by itself.

    Raises:
        ValueError: a value out of its range, a pattern without a match, or missing calibration data. The model is
            then as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> masks = prune(net, sparsity=0.75)
        >>> sum(int(mask.sum()) for mask in masks.values()), sum(int((m.weight != 0).sum()) for m in (net[0], net[2]))
        (6, 6)
    """
    pruner = Pruner(model, Recipe(sparsity, criterion, granularity, scope, include, exclude))
    rounds = checked_rounds(num_rounds)
    checked_solver(solver, granularity, blocks, num_rounds)
    if batches is not None and (num_rounds > 1 or solver is not None):
        batches = list(batches)
    measure = partial(calibrate, pruner.statistics, model, batches, forward=forward, loss=loss)
    if solver is None:
        prune_in_rounds_(pruner, rounds, measure)
    else:
        check_solver(solver, pruner)
        measure()
        pruner.choose_(1.0)
        solve_(pruner, solver, batches, forward=forward, loss=loss, blocks=blocks)
        pruner.apply_()
    if missed := shortfall(pruner):
        warnings.warn(missed, stacklevel=2)
    return pruner.masks
