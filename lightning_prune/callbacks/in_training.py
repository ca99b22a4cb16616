"""What the callbacks that hold masks while a model trains share: steps are counted, masks hold after each of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from torch.optim import Optimizer

from lightning_prune.callbacks.evaluation import NUM_EXAMPLES, calibration_batches, examples
from lightning_prune.callbacks.ownership import check_alone, check_as_traced, check_there
from lightning_prune.callbacks.run_length import lag_of, resolve_window, steps_done
from lightning_prune.callbacks.states import restoring
from lightning_prune.callbacks.stepping import Stepping, true_gradients
from lightning_prune.core.ramp import Ramp, check_timing
from lightning_prune.core.recipe import Recipe, as_text
from lightning_prune.core.types import Couples, Prescribes, Schedule
from lightning_prune.core.windows import StepWindow, Window
from lightning_prune.graph import Plan
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.optimizer import has_gradients, is_skipped, parameter_ids, trained_ids
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shrinking import AnyPruner, pruner_of
from lightning_prune.model.unpruned import layers_left_out

RESTFUL = 10
"""Steps between updates from which on it pays to exchange what optimizers hold."""


class InTraining(Stepping):
    """Base of the callbacks that prune while a model trains: updates fall due along a ramp, and masks hold in between.

    What happens at an update, the pruner's `update_` says, which `_new_pruner` makes. `_begin` is called before the
    first step, `_before_update` and `_after_update` around each update.

    Args:
        recipe: what is pruned.
        schedule: progress through the window -> fraction of the final sparsity.
        window: when masks are updated.
        report: as for `PruningCallback`.
        compact: whether optimizers step the surviving weights alone where that is faster.
    """

    holds_masks = True

    def __init__(
        self, recipe: Recipe, *, schedule: Schedule, window: Window, report: bool, compact: bool
    ) -> None:
        super().__init__(recipe, report=report, compact=compact)
        check_timing(schedule, window)
        self.schedule, self.window = schedule, window
        self.ramp: Ramp | None = None
        self._watching = ExitStack()
        self._is_counted = self._is_watching = self._is_news = self._is_in_batch = self._is_stepped = False

    @property
    def is_final(self) -> bool:
        """Whether the ramp is over."""
        return self.ramp is not None and self.ramp.is_over

    @property
    def unguarded(self) -> str | None:
        """Why updates cannot be watched and undone by a guard; None where they can."""
        scope = self.recipe.scope
        is_set = isinstance(scope, Prescribes)
        return f"whose scope, {scope}, gives each layer its sparsity" if is_set else None

    def roll_back_(self) -> str:
        """Undo the updates since the mark of the pruner's guard, and ask for their sparsity anew at the next step.

        Returns:
            The layer that is protected from now on.
        """
        assert isinstance(self.pruner, Pruner)
        self._forget()
        name = self.pruner.roll_back_()
        self._note_update(0.0, step=self._ramp.num_steps, progress=self._ramp.progress)
        self._ramp.is_due = self._is_news = True
        return name

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        return {**super().describe(), "schedule": as_text(self.schedule), "window": str(self.window)}

    def _new_pruner(self, trainer: L.Trainer, pl_module: L.LightningModule) -> AnyPruner:
        """Return the pruner of weights that are trained."""
        return pruner_of(pl_module, self.recipe, trained=trained_ids(trainer.optimizers))

    def _before_update(self) -> None:
        """Do what an update of the masks needs."""

    def _after_update(self) -> None:
        """Do what follows an update of the masks."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the targets, go on from what was loaded, and hook on to the optimizers."""
        self._before, self._is_news = self._take_state(pl_module), True
        self.ramp, self.updates, self.pruner = None, [], None
        if not isinstance(self.recipe.granularity, Couples):
            self.pruner = self._new_pruner(trainer, pl_module)
            check_alone(self, trainer)
            self._warn(*layers_left_out(pl_module, self.recipe, self.pruner.targets))
            self._go_on()
        self._hook_on(trainer)
        if self.pruner is not None and not self._optimizers:
            names = list(self.pruner.targets)
            raise ValueError(f"`include` names weights that are trained, but no optimizer steps {names}.")

    def _follow_(self, trainer: L.Trainer, module: L.LightningModule, plan: Plan) -> None:
        """Go on with the smaller model; weights that are not masked yet are found and checked anew in it."""
        is_new = isinstance(self.pruner, Pruner) and not self.pruner.masks
        if is_new and trainer.training and self._pruner.targets.keys() & plan.slices.keys():
            self.pruner = self._new_pruner(trainer, module)
        else:
            super()._follow_(trainer, module, plan)
        self._stop_watching()

    def _go_on(self) -> None:
        if self._before is not None:
            with restoring(self):
                self._restore_(self._before)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resolve the window, and update where it begins before the first step and the criterion needs no data.

        Not earlier: asking for the length of the run sets up its dataloader, whose place within the epoch Lightning
        restores only now.
        """
        if self._loaded is not None:  # strategies that shard restore a checkpoint after fitting has started
            self._before = self._take_state(pl_module)
            self._go_on()
        steps = resolve_window(self.window, trainer)
        num_done = steps_done(trainer)
        if self._before is None:  # a run that was dense so far ramps up from where it is
            self.ramp = Ramp(self.schedule, steps.begun_at(num_done), num_done)
        else:
            with restoring(self):
                is_same = self._before["nouns"] == self.describe()
                if is_same and (ended := self._before["ramp"].get("ended")):
                    steps = StepWindow(*ended)  # what is over stays over, however much longer the run is now
            self._go_along(Ramp(self.schedule, steps), self._before)
        if self.pruner is not None:
            self._begin()

    def _go_along(self, ramp: Ramp, before: dict[str, Any]) -> None:
        """Go on along a ramp from where the run was that is resumed."""
        self.ramp = ramp
        with restoring(self):
            ramp.load_state_dict(before["ramp"])

    def _begin(self) -> None:
        """Update before the first step, if the criterion needs no data."""
        if not self._pruner.statistics.activations:
            self._update_if_due()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch activations where an update is near; at other times no hook is set.

        Raises:
            ValueError: a layer was added to a model whose layers are coupled.
        """
        self._is_counted, self._is_in_batch = False, True
        self._notice_optimizers(trainer)
        if self.pruner is None:
            trained = trained_ids(trainer.optimizers)
            self.pruner = self._coupled(trainer, pl_module, examples(trainer, batch), trained)
            if self.holds_masks:
                check_alone(self, trainer)
            self._go_on()
            if isinstance(self.pruner, GroupPruner) and not self.updates:
                self.pruner.check_latency()
            self._begin()
        elif batch_idx == 0 and not self._ramp.is_over:
            check_as_traced(self._pruner)
        if self._pruner.statistics.activations and self._ramp.is_near and not self._is_watching:
            self._watching.enter_context(self._pruner.statistics.watch())
            self._is_watching = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Count the step, and note gradients (unscaled, not yet clipped) where the criterion needs them."""
        self._notice_optimizers(trainer, optimizer)
        if optimizer in self._optimizers:
            self._count()
            if self._ramp.is_over or self._ramp.steps.every >= RESTFUL:
                self._compact.follow(optimizer, self._pruner.targets, self._pruner.masks)
            statistics = self._pruner.statistics
            is_wanted = statistics.is_running and not self._ramp.is_over
            if is_wanted or (statistics.gradients and self._ramp.is_due):
                with true_gradients(trainer, optimizer):
                    statistics.note_gradients(parameter_ids([optimizer]), only_running=not self._ramp.is_due)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Mask before anything reads the weights that this optimizer has just changed.

        A step outside of a batch is none: torch takes one, of length 0, to have a state that a sharded checkpoint can
        be read into.
        """
        masked = self._compact.masked(optimizer)
        if not self._is_in_batch:
            return
        self._count()
        self._pruner.apply_(parameter_ids([optimizer]) - masked)
        statistics = self._pruner.statistics
        is_nothing = (self._ramp.is_due or statistics.is_noted) and is_skipped(optimizer)
        self._is_stepped = has_gradients(optimizer) and not is_nothing
        if not is_nothing:
            statistics.confirm()
            self._update_if_due()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Mask averaged copies of the weights, and log the sparsity where it is news."""
        self._is_in_batch = False
        self._mask_averages_(trainer)
        if self._is_news:
            achieved = self.updates[-1]["achieved"] if self.updates else 0.0
            pl_module.log("pruning/sparsity", achieved, prog_bar=True, batch_size=1)
            self._is_news = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log once in each epoch at least, and see that the module still has what is pruned.

        Raises:
            ValueError: a module was replaced or removed, whose masks would be lost without a word.
        """
        self._is_news = True
        if self.pruner is not None:
            self._pruner.apply_()
            check_there(pl_module, self._pruner.targets)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so early where the ramp will not end."""
        if lag := lag_of(self.window, self._ramp.steps.end, self._ramp.num_steps, trainer):
            self._warn(lag)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mask what someone may have written past torch's count of writes, by `.data`."""
        if self.compact and self.pruner is not None:
            self._pruner.apply_()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mask what averaging callbacks have put into the module, and say so where the target was not reached.

        Raises:
            ValueError: a module was replaced or removed, whose masks are lost with it.
        """
        if self.pruner is None:  # a run that goes on where no batch was left
            batches = calibration_batches(trainer, trainer.train_dataloader, NUM_EXAMPLES)
            self.pruner = self._coupled(trainer, pl_module, batches, trained_ids(trainer.optimizers))
            self._go_on()
        check_there(pl_module, self._pruner.targets)
        self._update_if_due()
        self._pruner.apply_()
        self._mask_averages_(trainer)
        if not self._ramp.is_over:
            self._warn(
                f"Training stopped after {self._ramp.num_steps} steps, before the ramp ended at "
                f"{self._ramp.steps.end}: sparsity is {self.updates[-1]['achieved'] if self.updates else 0.0:.4f}."
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind, and optimizers as they were."""
        super().teardown(trainer, pl_module, stage)
        self._stop_watching()

    def state_dict(self) -> dict[str, Any]:
        """Return masks, steps, updates and nouns, safe under `torch.load(weights_only=True)`."""
        state = super().state_dict() if self.pruner is not None else (self._before or super().state_dict())
        return {**state, "ramp": self.ramp.state_dict()} if self.ramp else {**(self._before or {}), **state}

    @property
    def _ramp(self) -> Ramp:
        assert self.ramp is not None
        return self.ramp

    def _update_(self, fraction: float, **when: Any) -> None:
        """Update the masks; what optimizers remember of weights that come back is zero, as the weights are."""
        self._forget()
        check_as_traced(self._pruner)
        super()._update_(fraction, **when)

    def _count(self) -> None:
        """Count a step once a batch, whichever of several optimizers comes first."""
        if not self._is_counted:
            self._is_counted = True
            self._ramp.tick()

    def _update_if_due(self) -> None:
        """Update the masks once the criterion has what it needs, after a step that was not skipped."""
        statistics = self._pruner.statistics
        has_seen = self._is_stepped or not statistics.activations
        if not (self._ramp.is_due and statistics.is_complete and has_seen):
            return
        self._stop_watching()
        self._before_update()
        self._update_(self._ramp.fraction, step=self._ramp.num_steps, progress=self._ramp.progress)
        self._forget()
        self._ramp.is_due, self._is_news = False, True
        self._after_update()

    def _stop_watching(self) -> None:
        self._watching.close()
        self._is_watching = False
