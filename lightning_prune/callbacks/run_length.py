"""How long a run is, as far as its trainer can tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_prune.core.windows import StepWindow, Window


def resolve_window(window: Window, trainer: L.Trainer) -> StepWindow:
    """Count a window in the optimizer steps of a trainer's run.

    Accumulation, `limit_train_batches`, `overfit_batches` and several processes are all in the trainer's own
    estimate; accumulation that changes from epoch to epoch is not, and is counted here. `fast_dev_run` takes one step,
    which becomes the whole of the window.

    Raises:
        ValueError: the window needs a length that the trainer cannot tell, or ends after the run.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return StepWindow(0, 1, 1)
    num_steps = float(trainer.estimated_stepping_batches)  # sets up the loaders, too
    if _accumulation(trainer) is not None:
        num_steps = _num_steps(trainer, steps_per_epoch(trainer))
    if window.unit == "run" and num_steps == trainer.max_steps and _steps_several_optimizers(trainer):
        raise ValueError(
            "`window` is counted in fractions of the run, whose length cannot be told here: with manual optimization, "
            f"`max_steps`, {trainer.max_steps}, counts the steps of {len(trainer.optimizers)} optimizers together. Set "
            "`max_epochs` instead, or give the window in steps: Window(start=..., end=..., every=..., unit='steps')."
        )
    lengths = _lengths(trainer, trainer.num_training_batches)
    return _in_steps(window, lengths).resolve(num_steps, steps_per_epoch(trainer))


def steps_done(trainer: L.Trainer) -> int:
    """Return the optimizer steps that a run has done when its training starts, counted once a batch.

    What Lightning counts for loggers is one behind in a run that is resumed within an epoch.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@contextmanager
def placed(trainer: L.Trainer, place: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """Let a trainer tell a module another place in the run, where its steps may do something else, and put it back.

    Args:
        trainer: whose run it is.
        place: the epoch and the global step; None leaves them as they are.

    Yields:
        The place.
    """
    epochs, loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    if not trainer.lightning_module.automatic_optimization:
        steps = loop.manual_optimization.optim_step_progress.total
    before = epochs.completed, steps.completed
    try:
        epochs.completed, steps.completed = place or before
        yield place or before
    finally:
        epochs.completed, steps.completed = before


def lag_of(window: Window, end: int, num_done: int, trainer: L.Trainer) -> str | None:
    """Say how far manual optimization that steps less often than once a batch will come, when its first epoch ends.

    Args:
        window: in what it is counted; of a window in steps there is nothing to say.
        end: the step at which it was taken to end.
        num_done: the steps of the first epoch.
        trainer: whose run it is.
    """
    is_counted = window.unit == "steps" or trainer.lightning_module.automatic_optimization
    if is_counted or trainer.current_epoch > 0 or trainer.max_epochs in (None, -1):
        return None
    if (num_steps := num_done * trainer.max_epochs) >= end:
        return None
    return (
        f"The first epoch took {num_done} optimizer steps, of {steps_per_epoch(trainer):.0f} batches: the run will end "
        f"after {num_steps}, before the ramp does, at {end}. Manual optimization does not say how often it steps: give "
        "the window in steps, Window(start=..., end=..., every=..., unit='steps')."
    )


def steps_per_epoch(trainer: L.Trainer) -> float:
    """Return the optimizer steps of one epoch; infinite where the trainer, whose loaders are set up, cannot tell."""
    return _steps_per_epoch(trainer, trainer.num_training_batches)


def _steps_per_epoch(trainer: L.Trainer, num_batches: float) -> float:
    """Return the optimizer steps of an epoch of so many batches; their mean where accumulation changes."""
    if not math.isfinite(num_batches):
        return math.inf
    if not (lengths := _lengths(trainer, num_batches)):
        return math.ceil(num_batches / trainer.accumulate_grad_batches)
    return sum(lengths) / len(lengths)


def _lengths(trainer: L.Trainer, num_batches: float) -> tuple[int, ...]:
    """Return the optimizer steps of each epoch where accumulation changes; nothing where they are all alike."""
    if (accumulation := _accumulation(trainer)) is None or not math.isfinite(num_batches):
        return ()
    epochs = range(max(1, trainer.max_epochs or 1))
    return tuple(math.ceil(num_batches / accumulation.get_accumulate_grad_batches(e)) for e in epochs)


def _in_steps(window: Window, lengths: Sequence[int]) -> Window:
    """Count a window in epochs by their lengths, where those differ; updates are as far apart as on average."""
    if window.unit != "epochs" or not lengths:
        return window

    def reached(epochs: float) -> int:
        whole = int(epochs)
        each = [lengths[min(e, len(lengths) - 1)] for e in range(whole + 1)]
        return sum(each[:whole]) + round((epochs - whole) * each[whole])

    start, end = reached(window.start), reached(window.end)
    epochs = window.end - window.start
    length = (end - start) / epochs if epochs else lengths[min(int(window.start), len(lengths) - 1)]
    return Window(start, end, max(1, round(window.every * length)), unit="steps")


def _num_steps(trainer: L.Trainer, per_epoch: float) -> float:
    epochs = math.inf if trainer.max_epochs in (None, -1) else max(trainer.max_epochs, 1)
    steps = per_epoch * epochs
    steps = round(steps) if math.isfinite(steps) else steps
    return min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps


def _accumulation(trainer: L.Trainer) -> GradientAccumulationScheduler | None:
    """Return what changes the accumulation from epoch to epoch, of which Lightning's own estimate knows nothing."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)


def _steps_several_optimizers(trainer: L.Trainer) -> bool:
    return not trainer.lightning_module.automatic_optimization and len(trainer.optimizers) > 1


@dataclass(frozen=True)
class RunLength:
    """How long a run will be.

    Args:
        num_steps: optimizer steps in all; infinite where nobody can tell.
        steps_per_epoch: of one epoch; infinite where nobody can tell.
        is_trial: whether it is a `fast_dev_run`, whose one step is the whole of a window.
        lengths: the steps of each epoch where they differ.
    """

    num_steps: float
    steps_per_epoch: float
    is_trial: bool = False
    lengths: tuple[int, ...] = ()

    def resolve(self, window: Window) -> StepWindow:
        """Count a window in steps, as `resolve_window` will.

        Raises:
            ValueError: the window needs a length that is not known, or ends after the run.
        """
        if self.is_trial:
            return StepWindow(0, 1, 1)
        return _in_steps(window, self.lengths).resolve(self.num_steps, self.steps_per_epoch)


def length_of(trainer: L.Trainer, loader: Any) -> RunLength:
    """Return how long a trainer's run on a loader will be, before it begins.

    Args:
        trainer: which has not been run; its limits, accumulation, epochs and processes count.
        loader: of the training data; None where there is none.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return RunLength(1, 1, is_trial=True)
    num_batches = _num_batches(trainer, loader)
    per_epoch = _steps_per_epoch(trainer, num_batches)
    return RunLength(_num_steps(trainer, per_epoch), per_epoch, lengths=_lengths(trainer, num_batches))


def _num_batches(trainer: L.Trainer, loader: Any) -> float:
    """Return how many batches of a loader each process sees in an epoch."""
    try:
        size = len(loader)
    except TypeError:
        size = None
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    limit = overfit if overfit else trainer.limit_train_batches
    if size is None:
        return float(limit) if isinstance(limit, int) else math.inf
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        size = math.ceil(size / trainer.world_size)
    return float(min(size, limit) if isinstance(limit, int) else int(size * limit))
