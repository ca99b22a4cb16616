"""Masks behind which weights live on: optimizers step those, and everything else sees masked weights."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.optim import Optimizer

from lightning_prune.callbacks.in_training import InTraining
from lightning_prune.callbacks.stepping import true_gradients
from lightning_prune.core.masking import checked_masking
from lightning_prune.core.recipe import Recipe, as_text
from lightning_prune.core.types import Masking, Masks, Schedule
from lightning_prune.core.windows import Window
from lightning_prune.model.optimizer import parameter_ids, trained_ids
from lightning_prune.model.shrinking import AnyPruner
from lightning_prune.model.soft import SoftPruner, check_steps


class SoftMasking(InTraining):
    """Base of the callbacks whose pruned weights may live on until the window ends.

    Weights wake when the gradients of a step are there and sleep again when the step is done. A step that mixed
    precision skips would leave them awake: there they wake once more, just before a step that is really taken.

    Args:
        recipe: what is pruned.
        masking: what becomes of pruned weights; None leaves them at zero.
        schedule: as for `InTraining`.
        window: when masks are updated; with its end they are settled.
        report: as for `PruningCallback`.
        compact: as for `InTraining`.

    Raises:
        ValueError: a masking that does not fit the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        masking: Masking | None,
        schedule: Schedule,
        window: Window,
        report: bool,
        compact: bool,
    ) -> None:
        super().__init__(recipe, schedule=schedule, window=window, report=report, compact=compact)
        self.masking = checked_masking(masking, recipe.granularity)
        self._can_skip = False

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        more = {"masking": as_text(self.masking)} if self.masking is not None else {}
        return {**super().describe(), **more}

    def _new_pruner(self, trainer: L.Trainer, pl_module: L.LightningModule) -> AnyPruner:
        if self.masking is None:
            return super()._new_pruner(trainer, pl_module)
        return SoftPruner(pl_module, self.recipe, self.masking, trained_ids(trainer.optimizers))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the targets, go on from what was loaded, and hook on to the optimizers.

        Raises:
            ValueError: an optimizer that soft masks cannot be had with.
        """
        self._can_skip = getattr(trainer.precision_plugin, "scaler", None) is not None
        super().on_fit_start(trainer, pl_module)

    def _hook_on(self, trainer: L.Trainer) -> None:
        super()._hook_on(trainer)
        if self.masking is not None:
            check_steps(self._optimizers)
            for optimizer in self._optimizers if self._can_skip else ():
                self._hooks.callback(optimizer.register_step_pre_hook(self._before_step).remove)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the weights wake that this optimizer is about to step, and note gradients with their values."""
        self._notice_optimizers(trainer, optimizer)
        soft = self.pruner if isinstance(self.pruner, SoftPruner) and optimizer in self._optimizers else None
        ids = parameter_ids([optimizer])
        if soft is not None:
            soft.wake_(ids)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if soft is not None:
            with true_gradients(trainer, optimizer):
                soft.turn_gradients_(ids)
            if self._can_skip:
                soft.apply_(ids)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(self.pruner, SoftPruner) and self._is_in_batch:
            self.pruner.wake_(parameter_ids([optimizer]))

    def _before_update(self) -> None:
        """Settle the masks with the last update."""
        if isinstance(self.pruner, SoftPruner):
            self.pruner.is_last = self._ramp.progress >= 1.0

    @property
    def _settled(self) -> Masks:
        return self.pruner.settled if isinstance(self.pruner, SoftPruner) else super()._settled

    def _note_update(self, fraction: float, **when: Any) -> None:
        """Write down an update; of those that only move weights, at one sparsity, the last."""
        super()._note_update(fraction, **when)
        if self.masking is not None and len(self.updates) > 1:
            before, last = self.updates[-2:]
            if before["requested"] == last["requested"]:
                del self.updates[-2]
