"""What a pruning callback would do to a module, told without training it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.evaluation import silenced, step_of
from lightning_prune.callbacks.in_training import InTraining
from lightning_prune.callbacks.initial import InitialPruning
from lightning_prune.callbacks.post_training import PostTrainingPruning
from lightning_prune.callbacks.rewinding import WeightRewinding
from lightning_prune.callbacks.run_length import RunLength, length_of
from lightning_prune.callbacks.sparse_training import SparseTraining
from lightning_prune.callbacks.strategies import check_strategy
from lightning_prune.callbacks.structure import check_can_shrink
from lightning_prune.core.rewinding import RewindingRecipe
from lightning_prune.core.types import Couples
from lightning_prune.core.windows import StepWindow
from lightning_prune.model.calls import Call, capture_call, random_states_kept, undisturbed
from lightning_prune.model.cost import measure
from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.layerwise import check_solver
from lightning_prune.model.preview import Expected, expect, planned_layers, risks_of
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shrinking import AnyPruner, groups_of
from lightning_prune.report.preview import PlannedUpdate, Preview


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
    troubles: list[str] = []
    small = _detached(model)
    loader, batch = _one_batch(data, model, troubles)
    call = None if batch is None else _call_of(small, batch, trainer, troubles)
    if pruning is None:
        cost = measure(small, call, latency=False, compress=False)
        return Preview(
            "none", model=type(model).__name__, cost_before=cost, cost_after=cost, troubles=tuple(troubles)
        )
    troubles += _against_trainer(pruning, trainer)
    expected = _expected(pruning, small, call, is_trained)
    troubles += expected.troubles
    layers = planned_layers(model, expected)
    final = expected.pruner.final_sparsity if expected.pruner is not None else None
    updates, when, notes = _times(pruning, trainer, loader, final, troubles)
    return Preview(
        kind=pruning.kind,
        recipe=pruning.describe(),
        model=type(model).__name__,
        target_sparsity=final,
        targets=_names(expected.pruner),
        left_out=expected.left_out,
        layers=layers,
        cost_before=expected.before,
        cost_after=expected.after,
        groups=groups_of(expected.pruner),
        frozen=_frozen(expected.pruner),
        updates=updates if final is not None else (),
        when=when,
        notes=(*expected.notes, *notes),
        risks=tuple(risks_of(layers, expected)) if expected.after else (),
        troubles=tuple(dict.fromkeys(troubles)),
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


def _detached(model: L.LightningModule) -> L.LightningModule:
    """Return a copy of a module that belongs to no trainer."""
    trainer = model._trainer
    return copy.deepcopy(model, {id(trainer): None} if trainer is not None else {})


def _one_batch(data: Any, model: L.LightningModule, troubles: list[str]) -> tuple[Any, Any]:
    """Return the training loader and its first batch, or None for what cannot be had."""
    device = next((p.device for p in model.parameters()), model.device)
    try:
        with random_states_kept(device):
            loader = data
            if isinstance(data, L.LightningDataModule):
                data.prepare_data()
                data.setup("fit")
                loader = data.train_dataloader()
            batch = next(iter(loader), None)
    except Exception as error:  # whatever a user's data module raises
        troubles.append(f"`data` gives no batch: {type(error).__name__}: {error}")
        return None, None
    if batch is None:
        troubles.append("`data` gives at least one batch, but got none.")
    return loader, batch


def _call_of(
    module: L.LightningModule, batch: Any, trainer: L.Trainer | None, troubles: list[str]
) -> Call | None:
    """Return the call of the model that its own step makes for a batch, on the CPU or where the model is."""
    from lightning.pytorch.utilities import move_data_to_device

    module._trainer = trainer
    try:
        moved = move_data_to_device(batch, next((p.device for p in module.parameters()), module.device))
        with undisturbed(module), silenced(module), capture_call(module) as caught:
            step_of(module)(module, moved)
    except Exception as error:  # whatever a user's step raises
        troubles.append(f"`training_step` does not run on the first batch: {type(error).__name__}: {error}")
        return None
    finally:
        module._trainer = None
    if caught.call is None:
        troubles.append(f"a step of {type(module).__name__} calls no module that has parameters.")
    return caught.call


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
    checkpoint = trainer.checkpoint_callback
    if getattr(pruning, "checkpoint", None) == "best" and not (
        isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor
    ):
        found.append(
            '`checkpoint` is "best" only with a ModelCheckpoint(monitor=...), but the Trainer has none.'
        )
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


def _times(
    pruning: PruningCallback, trainer: L.Trainer | None, loader: Any, final: float | None, troubles: list[str]
) -> tuple[tuple[PlannedUpdate, ...], str, tuple[str, ...]]:
    """Return when the masks are updated, in words too, and what is to be said of it."""
    length = length_of(trainer, loader) if trainer is not None else None
    goal = final or 0.0
    if isinstance(pruning, InitialPruning):
        rounds = f"in {pruning.num_rounds} rounds" if pruning.num_rounds > 1 else "at once"
        return (PlannedUpdate(0, goal, 0.0),), f"before the first step, {rounds}", ()
    if isinstance(pruning, PostTrainingPruning):
        rounds = f", in {pruning.num_rounds} rounds" if pruning.num_rounds > 1 else ""
        return (), f"when training is over, or without it{rounds}", ()
    try:
        if isinstance(pruning, WeightRewinding):
            return _levels(pruning.chosen, goal, trainer, length)
        assert isinstance(pruning, InTraining)
        return _ramp(pruning, goal, length)
    except ValueError as error:
        troubles.append(str(error))
        return (), "", ()


def _ramp(
    pruning: InTraining, final: float, length: RunLength | None
) -> tuple[tuple[PlannedUpdate, ...], str, tuple[str, ...]]:
    window = pruning.window
    if length is None and window.unit != "steps":
        return (), str(window), ("When masks are updated, follows from the Trainer, which was not given.",)
    steps = (length or RunLength(math.inf, math.inf)).resolve(window)
    per_epoch = length.steps_per_epoch if length is not None else math.inf
    updates = tuple(
        PlannedUpdate(step, final * pruning.schedule(steps.progress(step)), _epochs(step, per_epoch))
        for step in _fired(steps)
    )
    in_all = f" of {length.num_steps:,.0f}" if length is not None and math.isfinite(length.num_steps) else ""
    every = f", every {steps.every:,}" if len(updates) > 2 else ""
    when = f"{len(updates):,} updates, after steps {steps.start:,} to {steps.end:,}{in_all}{every}"
    return updates, when, ()


def _fired(steps: StepWindow) -> list[int]:
    found = list(range(steps.start, steps.end + 1, steps.every))
    return found if found[-1] == steps.end else [*found, steps.end]


def _epochs(step: int, per_epoch: float) -> float | None:
    return step / per_epoch if math.isfinite(per_epoch) and per_epoch > 0 else None


def _levels(
    chosen: RewindingRecipe, final: float, trainer: L.Trainer | None, length: RunLength | None
) -> tuple[tuple[PlannedUpdate, ...], str, tuple[str, ...]]:
    """Return one update for each level, after the training before it."""
    told = f"{chosen.num_levels} times, each after a training; then back to epoch {chosen.epoch}"
    if trainer is None or length is None:
        return (), told, ("When masks are updated, follows from the Trainer, which was not given.",)
    epochs = trainer.max_epochs
    if epochs is None or epochs < 1 or trainer.max_steps != -1:
        raise ValueError(
            "`max_epochs` is the length of one training, at least 1, and `max_steps` is not set, but got "
            f"{epochs} and {trainer.max_steps}."
        )
    if chosen.epoch >= epochs:
        raise ValueError(f"`epoch` is one of the first training's {epochs}, but got {chosen.epoch}.")
    per_epoch = length.steps_per_epoch
    ends = [chosen.num_epochs(level, epochs) for level in range(chosen.num_levels)]
    updates = tuple(
        PlannedUpdate(round(end * per_epoch), chosen.sparsity_at(level, final), float(end))
        for level, end in enumerate(ends, start=1)
        if math.isfinite(per_epoch)
    )
    in_all = chosen.num_epochs(chosen.num_levels, epochs)
    return updates, f"{told}; {in_all:,} epochs in all", ()
