"""How long a run is, as far as its trainer can tell."""

from __future__ import annotations

import math

import lightning as L

from lightning_prune.core.windows import StepWindow, Window


def resolve_window(window: Window, trainer: L.Trainer) -> StepWindow:
    """Count a window in the optimizer steps of a trainer's run.

    Accumulation, `limit_train_batches`, `overfit_batches` and several processes are all in the trainer's own
    estimate. `fast_dev_run` takes one step, which becomes the whole of the window.

    Raises:
        ValueError: the window needs a length that the trainer cannot tell, or ends after the run.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return StepWindow(0, 1, 1)
    num_steps = float(trainer.estimated_stepping_batches)
    steps_per_epoch = (
        math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if _is_sized(trainer)
        else math.inf
    )
    if window.unit == "run" and num_steps == trainer.max_steps and _steps_several_optimizers(trainer):
        raise ValueError(
            "`window` is counted in fractions of the run, whose length cannot be told here: with manual optimization, "
            f"`max_steps`, {trainer.max_steps}, counts the steps of {len(trainer.optimizers)} optimizers together. Set "
            "`max_epochs` instead, or give the window in steps: Window(start=..., end=..., every=..., unit='steps')."
        )
    return window.resolve(num_steps, steps_per_epoch)


def _is_sized(trainer: L.Trainer) -> bool:
    return math.isfinite(trainer.num_training_batches)


def _steps_several_optimizers(trainer: L.Trainer) -> bool:
    return not trainer.lightning_module.automatic_optimization and len(trainer.optimizers) > 1
