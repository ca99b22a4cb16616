"""Pruning while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
from torch.optim import Optimizer

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.run_length import resolve_window
from lightning_prune.callbacks.structure import averaged_models, check_can_shrink
from lightning_prune.core.budgets import Budget
from lightning_prune.core.criteria import check_can_train
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Weight
from lightning_prune.core.ramp import Ramp
from lightning_prune.core.recipe import Recipe, as_text, checked_shrink
from lightning_prune.core.schedules import Polynomial
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import Couples, Criterion, Granularity, Schedule, Scope
from lightning_prune.core.windows import Window
from lightning_prune.model.optimizer import mask_state_, parameter_ids, trained_ids
from lightning_prune.model.shrinking import AnyPruner, pruner_of

DECAYED = 0.3  # of the peak learning rate: below it, a network hardly recovers from what is pruned


class TrainTimePruning(PruningCallback):
    """Prune during training: sparsity ramps up, and pruned weights are zero after each optimizer step.

    `Trainer(callbacks=[TrainTimePruning(sparsity=0.9)])` is gradual pruning, Zhu & Gupta 2017 (arXiv:1710.01878), by
    global magnitude over the first 70 % of the run; every noun can be exchanged. Parameters keep their names and
    class, checkpoints hold plain weights that are zero where they are pruned, and a resumed run goes on bit for bit.

    A step, here and in `window`, is a training batch on which an optimizer of a pruned weight was to step. Keep the
    learning rate high while the sparsity rises and let it decay after: that matters more than any criterion.

    Args:
        sparsity: fraction of the groups removed in the end, in [0, 1); numbers by name pattern; None where the scope
            prescribes it.
        schedule: progress through the window -> fraction of `sparsity`, both in [0, 1].
        criterion: how good each weight is.
        granularity: what goes as one piece.
        scope: who competes with whom.
        window: when masks are updated.
        include: patterns or module types to prune; by default the linear, convolution and attention weights that are
            trained: stepped by an optimizer and not frozen when fitting starts.
        exclude: patterns or module types to leave out.
        report: whether to write `report.json` and `report.md` beside the run.
        shrink: for coupled granularities (`Channel`, `Head`), when what is masked is taken out of the model for real:
            at the "end" of the ramp (the default), with each "update", so that training gets faster as the model gets
            smaller, or "never".
        budget: for coupled granularities, what the smaller model may cost, in place of `sparsity`.

    Raises:
        ValueError: a value out of its range, at once; what does not fit model or trainer, before the first step.

    Example:
        >>> from lightning_prune import Linear, TrainTimePruning, Window
        >>> pruning = TrainTimePruning(sparsity=0.9, schedule=Linear(), window=Window(end=0.5), exclude=["head"])
        >>> pruning.describe()["schedule"]
        'Linear()'
    """

    kind = "train_time"

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        schedule: Schedule = Polynomial(),
        criterion: Criterion = Magnitude(),
        granularity: Granularity | Couples = Weight(),
        scope: Scope = Global(),
        window: Window = Window(),
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] = (),
        report: bool = True,
        shrink: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        recipe = Recipe(sparsity, criterion, granularity, scope, include, exclude, budget)
        super().__init__(recipe, report=report)
        check_can_train(criterion)
        self.schedule, self.window, self.shrink = schedule, window, checked_shrink(shrink, granularity)
        self.ramp: Ramp | None = None
        self._before: dict[str, Any] | None = None
        self._optimizers: list[Optimizer] = []
        self._hooks, self._watching = ExitStack(), ExitStack()
        self._peak_lr, self._is_counted, self._is_watching, self._is_news = 0.0, False, False, False
        self._is_to_shrink = False

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        nouns = {**super().describe(), "schedule": as_text(self.schedule), "window": str(self.window)}
        return nouns | ({"shrink": self.shrink} if self.shrink is not None else {})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose sparsity, or could not follow a model that becomes smaller.

        Raises:
            ValueError: a strategy that shards the weights, or whose processes could not follow.
        """
        super().setup(trainer, pl_module, stage)
        if self.shrink in ("end", "update") and stage == "fit":
            check_can_shrink(trainer, self.shrink)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the targets, go on from what was loaded, and hook on to the optimizers."""
        self._before = self._take_state(pl_module)
        self.ramp, self.updates, self.pruner = None, [], None
        self._optimizers = list(trainer.optimizers)
        if not isinstance(self.recipe.granularity, Couples):
            self.pruner = pruner_of(pl_module, self.recipe, trained=trained_ids(trainer.optimizers))
            self._go_on()
            targets = {id(parameter) for parameter in self._pruner.targets.values()}
            self._optimizers = [o for o in trainer.optimizers if parameter_ids([o]) & targets]
            if not self._optimizers:
                raise ValueError(
                    f"`include` names weights that are trained, but no optimizer steps {list(self._pruner.targets)}."
                )
        self._hooks.close()
        for optimizer in self._optimizers:
            self._hooks.callback(optimizer.register_step_post_hook(self._after_step).remove)

    def _go_on(self) -> None:
        if self._before is not None:
            self._restore_(self._before)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resolve the window, and update where it begins before the first step and the criterion needs no data.

        Not earlier: asking for the length of the run sets up its dataloader, whose place within the epoch Lightning
        restores only now.
        """
        steps, num_done = (
            resolve_window(self.window, trainer),
            trainer.fit_loop.epoch_loop._batches_that_stepped,
        )
        if self._before is None:  # a run that was dense so far ramps up from where it is
            self.ramp, self._peak_lr = Ramp(self.schedule, steps.begun_at(num_done), num_done), 0.0
        else:
            self.ramp, self._peak_lr = Ramp(self.schedule, steps), self._before["peak_lr"]
            self.ramp.load_state_dict(self._before["ramp"])
        if self.pruner is not None and not self._pruner.statistics.activations:
            self._update_if_due()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any
    ) -> None:
        """Watch activations where an update is near; at other times no hook is set."""
        self._is_counted = False
        if self.pruner is None:
            self.pruner = self._coupled(trainer, pl_module, batch, trained_ids(trainer.optimizers))
            self._go_on()
            if not self._pruner.statistics.activations:
                self._update_if_due()
        if self._pruner.statistics.activations and self._ramp.is_near and not self._is_watching:
            self._watching.enter_context(self._pruner.statistics.watch())
            self._is_watching = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Count the step, and note gradients (unscaled, not yet clipped) where the criterion needs them."""
        if optimizer in self._optimizers:
            self._count()
            statistics = self._pruner.statistics
            if statistics.is_running or (statistics.gradients and self._ramp.is_due):
                statistics.note_gradients(parameter_ids([optimizer]))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Mask before anything reads the weights that this optimizer has just changed."""
        self._count()
        self._pruner.statistics.confirm()
        self._pruner.apply_(parameter_ids([optimizer]))
        self._update_if_due()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Mask averaged copies of the weights, and log the sparsity where it is news."""
        self._mask_averages_(trainer)
        if self._is_to_shrink:
            self._shrink_(trainer, pl_module, self._optimizers, averaged_models(trainer))
            self._is_to_shrink = False
        if self._is_news:
            achieved = self.updates[-1]["achieved"] if self.updates else 0.0
            pl_module.log("pruning/sparsity", achieved, prog_bar=True, batch_size=1)
            self._is_news = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log once in each epoch at least."""
        self._is_news = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mask what averaging callbacks have put into the module, and say so where the target was not reached."""
        self._update_if_due()
        self._pruner.apply_()
        self._mask_averages_(trainer)
        if not self._ramp.is_over:
            self._warn(
                f"Training stopped after {self._ramp.num_steps} steps, before the ramp ended at "
                f"{self._ramp.steps.end}: sparsity is {self.updates[-1]['achieved'] if self.updates else 0.0:.4f}."
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._hooks.close()
        self._stop_watching()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return masks, steps, updates and nouns, safe under `torch.load(weights_only=True)`."""
        state = super().state_dict() if self.pruner is not None else (self._before or super().state_dict())
        if self.ramp is not None:
            return {**state, "ramp": self.ramp.state_dict(), "peak_lr": self._peak_lr}
        return {**(self._before or {}), **state}

    @property
    def _pruner(self) -> AnyPruner:
        assert self.pruner is not None
        return self.pruner

    @property
    def _ramp(self) -> Ramp:
        assert self.ramp is not None
        return self.ramp

    def _count(self) -> None:
        """Count a step once a batch, whichever of several optimizers comes first."""
        if not self._is_counted:
            self._is_counted = True
            self._ramp.tick()

    def _update_if_due(self) -> None:
        """Update the masks once the criterion has what it needs."""
        if not (self._ramp.is_due and self._pruner.statistics.is_complete):
            return
        self._stop_watching()
        self._update_(self._ramp.fraction, step=self._ramp.num_steps, progress=self._ramp.progress)
        mask_state_(self._optimizers, self._pruner.targets, self._pruner.masks)
        self._ramp.is_due = False
        self._is_news = True
        self._is_to_shrink = self.shrink == "update" or (self.shrink == "end" and self._ramp.is_over)
        self._check_learning_rate()

    def _check_learning_rate(self) -> None:
        lr = max(float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups)
        self._peak_lr = max(self._peak_lr, lr)
        if self._ramp.is_over and lr < DECAYED * self._peak_lr:
            self._warn(
                f"The learning rate had fallen to {lr / self._peak_lr:.0%} of its peak when the sparsity ramp ended "
                f"(step {self._ramp.num_steps}), too low to recover from the last updates. Keep it constant until the "
                "ramp ends and let it decay after, or end the ramp earlier: window=Window(end=...)."
            )

    def _mask_averages_(self, trainer: L.Trainer) -> None:
        for model in averaged_models(trainer):
            self._pruner.apply_to_(model)

    def _stop_watching(self) -> None:
        self._watching.close()
        self._is_watching = False
