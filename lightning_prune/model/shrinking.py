"""`shrink` makes a model physically smaller, no Trainer needed; `pruner_of` finds the pruner for a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.core.budgets import Budget
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Channel, Head, Layer
from lightning_prune.core.masks import sparsity_of
from lightning_prune.core.recipe import Recipe, checked_solver
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import Couples, Criterion, Name, Scope, Solver
from lightning_prune.graph import Plan
from lightning_prune.model.calibration import calibrate, reestimate_batch_norm_
from lightning_prune.model.calls import Call, call_of
from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.reconstruction import reconstruct_
from lightning_prune.model.shortfall import shortfall
from lightning_prune.model.targets import Pattern
from lightning_prune.model.unpruned import modules_not_run
from lightning_prune.report.data import Group

AnyPruner: TypeAlias = Pruner | GroupPruner | DepthPruner


def sparsities_of(pruner: AnyPruner) -> dict[Name, float]:
    """Return the fraction of each weight that its mask removes."""
    if isinstance(pruner, Pruner):
        return pruner.sparsities
    return {name: sparsity_of({name: mask}) for name, mask in pruner.masks.items()}


def pruner_of(
    model: nn.Module, recipe: Recipe, call: Call | None = None, trained: Container[int] | None = None
) -> AnyPruner:
    """Return the pruner that a recipe's granularity asks for.

    Args:
        model: what is pruned.
        recipe: what goes, and how much.
        call: an example call, which coupled granularities need.
        trained: ids of the parameters that are being trained.

    Raises:
        ValueError: the recipe does not fit the model.
    """
    if not isinstance(recipe.granularity, Couples):
        return Pruner(model, recipe, trained)
    assert call is not None
    kind = DepthPruner if isinstance(recipe.granularity, Layer) else GroupPruner
    return kind(model, recipe, call, trained)


def groups_of(pruner: AnyPruner | None) -> tuple[Group, ...]:
    """Return what goes together: coupled indices, or blocks as wholes."""
    if isinstance(pruner, DepthPruner):
        role, gone = pruner.granularity.unit, set(pruner.skipped)
        return tuple(Group(path, role, 1, int(path not in gone)) for path in pruner.blocks)
    if not isinstance(pruner, GroupPruner):
        return ()
    counts, present = pruner.contest.counts(pruner.choice), pruner.couplings.groups
    return tuple(
        Group(
            name,
            present[name].role if name in present else "channel",
            size,
            counts[name],
            tuple(f"{m.tensor}[{m.dim}]" for m in present[name].members) if name in present else (),
        )
        for name, size in pruner.contest.sizes.items()
    )


def shrink(
    model: nn.Module,
    example: Any,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    budget: Budget | None = None,
    criterion: Criterion = Magnitude(),
    granularity: Channel | Head | Layer = Channel(),
    scope: Scope = Global(),
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    solver: Solver | None = None,
    blocks: str | None = None,
    reestimate_batch_norm: bool = False,
) -> Plan:
    """Take channels, heads or layers out of a model, with all that is coupled to them, in place and in one shot.

    The model is run once to see what is coupled; the smaller model is proved equal to the masked one before anything
    is changed. What cannot be pruned stays, and the plan's model says why (`trace(...).frozen`).

    Args:
        model: any module that runs.
        example: its arguments: a tensor, a tuple of positional or a mapping of keyword arguments.
        sparsity: fraction of the groups removed, in [0, 1). It is no fraction of parameters: half of all channels
            leave about a quarter of them.
        budget: what the smaller model may cost, in place of a sparsity.
        criterion: how good each weight is; with `Layer`, the default stands for the influence of blocks.
        granularity: what goes as one piece.
        scope: who competes with whom.
        include: patterns or module types whose outputs are pruned; by default those of all layers.
        exclude: patterns or module types whose outputs stay; their inputs follow the layers before.
        batches: calibration data, for criteria by activations or gradients, and for the influence of blocks, which is
            measured on the example without it.
        forward: (model, batch) -> anything, runs the model on one batch.
        loss: (model, batch) -> scalar, for criteria by gradients.
        optimizers: whose state is cut alike.
        copies: averages of the model's weights, which are cut alike; also those of a submodule that the model holds
            beside it, as in `shrink(model, x, 0.5, copies=[model.ema])`. Torch's `AveragedModel` within the model is
            found without being named; other submodules that may be averages stay whole, with a warning.
        solver: how the weights that stay make up for those that go, layer by layer: `LeastSquares()`; it needs
            `batches`. `copies` are cut, and not solved for.
        blocks: for a solver, path of the module whose children run one after the other, as decoder layers do; by
            default the longest such chain, and without one each layer by itself.
        reestimate_batch_norm: whether batch-norm statistics are computed anew on `batches`, after pruning.

    Returns:
        What was done: printable, and the record with which the smaller model is built again.

    Raises:
        ValueError: a value out of its range, a pattern without a match, a budget out of reach, or nothing to prune.
            The model is then as it was.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> print(shrink(net, torch.ones(1, 8), 0.5).groups, net[2])
        {'0.weight': (32, 16)} Linear(in_features=16, out_features=2, bias=True)
    """
    recipe = Recipe(sparsity, criterion, granularity, scope, include, exclude, budget)
    if not isinstance(granularity, Couples):
        raise ValueError(
            f"`granularity` is of coupled groups, Channel(), Head() or Layer(), but got {granularity}, which makes no "
            "model smaller: `prune` sets weights to zero."
        )
    checked_solver(solver, granularity, blocks)
    batches = list(batches) if batches is not None else None
    if reestimate_batch_norm and not batches:
        raise ValueError("`batches` is calibration data, which batch norms need, but got none.")
    pruner = pruner_of(model, recipe, call_of(model, example))
    assert not isinstance(pruner, Pruner)  # by the granularity
    outside = pruner.copies.declare(copies)
    if batches is not None or not recipe.by_influence:  # which is measured on the example as well
        calibrate(pruner.statistics, model, batches, forward=forward, loss=loss)
    pruner.choose_(1.0)
    notes = list(modules_not_run(pruner))
    with ExitStack() as undo:
        if solver is not None:
            assert isinstance(pruner, GroupPruner)
            reconstruct_(pruner, solver, batches, undo, forward=forward, blocks=blocks)
        plan = pruner.shrink_(optimizers, outside)
        undo.pop_all()
    if reestimate_batch_norm:
        reestimate_batch_norm_(model, batches or (), forward=forward)
    for said in (*notes, *pruner.copies.notes, *([missed] if (missed := shortfall(pruner)) else [])):
        warnings.warn(said, stacklevel=2)
    return plan
