"""When a run that is only planned would update its masks."""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.course import Course
from lightning_prune.callbacks.in_training import InTraining
from lightning_prune.callbacks.initial import InitialPruning
from lightning_prune.callbacks.post_training import PostTrainingPruning
from lightning_prune.callbacks.rewinding import WeightRewinding
from lightning_prune.callbacks.run_length import RunLength, length_of
from lightning_prune.core.rewinding import RewindingRecipe
from lightning_prune.core.windows import StepWindow
from lightning_prune.report.preview import PlannedUpdate


def times_of(
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
    told = f"{chosen.num_levels} times, each after a training; then back to {chosen.place}"
    if trainer is None or length is None:
        return (), told, ("When masks are updated, follows from the Trainer, which was not given.",)
    epochs = trainer.max_epochs
    if epochs is None or epochs < 1 or trainer.max_steps != -1:
        raise ValueError(
            "`max_epochs` is the length of one training, at least 1, and `max_steps` is not set, but got "
            f"{epochs} and {trainer.max_steps}."
        )
    per_epoch = length.steps_per_epoch
    course = Course(chosen.num_levels, chosen.start(epochs, per_epoch), epochs)
    before = course.epoch * per_epoch if chosen.step is None else chosen.step
    updates = tuple(
        PlannedUpdate(
            round(epochs * per_epoch + done * (epochs * per_epoch - before)),
            chosen.sparsity_at(done + 1, final),
            float(course.end(done)),
        )
        for done in range(chosen.num_levels)
        if math.isfinite(per_epoch)
    )
    return updates, f"{told}; {course.end(chosen.num_levels):,} epochs in all", ()
