"""What a pruning callback would do to a module, told without training it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import lightning as L

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.best_weights import check_has_best
from lightning_prune.callbacks.evaluation import NUM_EXAMPLES, with_more
from lightning_prune.callbacks.initial import InitialPruning
from lightning_prune.callbacks.post_training import PostTrainingPruning
from lightning_prune.callbacks.sparse_training import SparseTraining
from lightning_prune.callbacks.strategies import check_strategy
from lightning_prune.callbacks.structure import check_can_shrink
from lightning_prune.callbacks.timetable import times_of
from lightning_prune.callbacks.trial import first_batch, first_call
from lightning_prune.core.types import Couples
from lightning_prune.model.calls import Call
from lightning_prune.model.copies import copied
from lightning_prune.model.cost import measure
from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.layerwise import check_solver
from lightning_prune.model.planned import planned_layers, risks_of
from lightning_prune.model.preview import Expected, expect
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shrinking import AnyPruner, groups_of
from lightning_prune.report.preview import Preview


def preview(
    pruning: PruningCallback | None,
    model: L.LightningModule,
    data: L.LightningDataModule | Iterable[Any],
    trainer: L.Trainer | None = None,
    *,
    is_trained: bool = False,
) -> Preview:
    """Tell what a pruning callback would do, without training: print it, or look at its fields.

    The recipe is carried out on a copy of the model, with one batch of the data where coupled groups or multiply-
    accumulates need a call; the model is left as it is. `troubles` are what the run would be refused for, or would not
    reach; `risks` are layers of which very little would be left.

    Args:
        pruning: the callback, or None for a run that prunes nothing.
        model: the module, its weights as they are before the run.
        data: a datamodule, or batches such as a DataLoader.
        trainer: says how long the run is, and so when masks are updated; it is not run. Without it, times that are
            fractions of the run stay unknown.
        is_trained: whether the weights are those that will be pruned, as of a checkpoint that is pruned without
            training.

    Example:
        >>> import torch
        >>> from lightning_prune import Global, TrainTimePruning, preview
        >>> from lightning_prune.examples.tasks import Classifier
        >>> batches = [(torch.zeros(4, 8), torch.zeros(4).long())]
        >>> found = preview(TrainTimePruning(0.5), Classifier("MLP", sizes=[8, 16, 10]), batches)
        >>> found.is_fine, found.cost_before.nonzeros - found.cost_after.nonzeros
        (True, 144)
    """
    if not isinstance(model, L.LightningModule) or not isinstance(pruning, PruningCallback | None):
        raise ValueError(
            f"`pruning` and `model` are a pruning callback and a LightningModule, in this order, but got "
            f"{type(pruning).__name__} and {type(model).__name__}."
        )
    troubles: list[str] = []
    small = copied(model)
    loader, batch = first_batch(data, model, troubles)
    batches = with_more(batch, model.device, lambda: islice(iter(loader), 1, NUM_EXAMPLES))
    call = None if batch is None else first_call(small, batches, trainer, troubles)
    if pruning is None:
        cost = measure(small, call, latency=False, compress=False)
        name = type(model).__name__
        return Preview("none", model=name, cost_before=cost, cost_after=cost, troubles=tuple(troubles))
    troubles += _against_trainer(pruning, trainer)
    expected = _expected(pruning, small, call, is_trained)
    troubles += expected.troubles
    found = _told(pruning, model, expected)
    updates, when, notes = times_of(pruning, trainer, loader, found.target_sparsity, troubles)
    return replace(
        found,
        updates=updates if found.target_sparsity is not None else (),
        when=when,
        notes=(*expected.notes, *notes),
        troubles=tuple(dict.fromkeys(troubles)),
    )


def _told(pruning: PruningCallback, model: L.LightningModule, expected: Expected) -> Preview:
    """Return what is expected of a model, without when and without what stands against it."""
    layers, pruner = planned_layers(model, expected), expected.pruner
    return Preview(
        kind=pruning.kind,
        recipe=pruning.describe(),
        model=type(model).__name__,
        target_sparsity=pruner.final_sparsity if pruner is not None else None,
        targets=_names(pruner),
        left_out=expected.left_out,
        layers=layers,
        cost_before=expected.before,
        cost_after=expected.after,
        groups=groups_of(pruner),
        frozen=_frozen(pruner),
        risks=tuple(risks_of(layers, expected)) if expected.after else (),
    )


def _names(pruner: AnyPruner | None) -> tuple[str, ...]:
    if pruner is None:
        return ()
    if isinstance(pruner, DepthPruner):
        return tuple(pruner.blocks)
    return tuple(pruner.scored if isinstance(pruner, GroupPruner) else pruner.targets)


def _frozen(pruner: AnyPruner | None) -> dict[str, str]:
    if pruner is None or isinstance(pruner, Pruner):
        return {}
    return {**pruner.couplings.frozen, **pruner.frozen}


def _against_trainer(pruning: PruningCallback, trainer: L.Trainer | None) -> list[str]:
    """Return why a trainer would refuse the callback."""
    if trainer is None:
        return []
    found = []
    try:
        check_strategy(trainer.strategy, pruning)
    except ValueError as error:
        found.append(str(error))
    shrink = getattr(pruning, "shrink", None)
    if shrink in ("end", "update"):
        try:
            check_can_shrink(trainer, shrink)
        except ValueError as error:
            found.append(str(error))
    if getattr(pruning, "checkpoint", None) == "best":
        try:
            check_has_best(trainer)
        except ValueError as error:
            found.append(str(error))
    return found


def _expected(
    pruning: PruningCallback, module: L.LightningModule, call: Call | None, is_trained: bool
) -> Expected:
    is_after = isinstance(pruning, PostTrainingPruning)
    trained = None if is_after else {id(p) for p in module.parameters() if p.requires_grad}
    is_coupled = isinstance(pruning.recipe.granularity, Couples)
    is_first = isinstance(pruning, InitialPruning)

    def check(pruner: Pruner) -> None:
        if isinstance(pruning, PostTrainingPruning) and pruning.solver is not None:
            check_solver(pruning.solver, pruner)

    return expect(
        module,
        pruning.sparse if isinstance(pruning, SparseTraining) else pruning.recipe,
        call,
        trained=trained,
        shrinks=is_coupled and getattr(pruning, "shrink", "end") != "never",
        is_final=is_trained or is_first,
        check=check,
    )
