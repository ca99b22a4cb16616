"""Lottery tickets: train, prune, go back to an early moment of the run, and train what is left again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_prune.callbacks.course import Course
from lightning_prune.callbacks.in_training import InTraining
from lightning_prune.callbacks.ownership import check_same_size, mask_all_, partners
from lightning_prune.callbacks.run_length import steps_done, steps_per_epoch
from lightning_prune.callbacks.structure import restart_averages_
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Weight
from lightning_prune.core.ramp import Ramp
from lightning_prune.core.rewinding import RewindingRecipe
from lightning_prune.core.schedules import Constant
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import Couples, Criterion, Granularity, Scope
from lightning_prune.core.windows import StepWindow, Window
from lightning_prune.model.optimizer import mask_state_
from lightning_prune.model.rewind import Snapshot, rewind_, take


class WeightRewinding(InTraining):
    """Iterative pruning with rewinding: the network is trained `num_levels` + 1 times, sparser each time, in one fit.

    Frankle & Carbin 2018 (arXiv:1803.03635): train, prune the smallest weights, set the others back to where they
    began, train again; density falls by the same factor at each level, (1 - `sparsity`)^(k / `num_levels`) after level
    k. `epoch` or `step` above 0 goes back to an early epoch or optimizer step instead of the initialisation (Frankle et
    al. 2019, arXiv:1903.01611, and 2020, arXiv:1912.05671); `rewind="learning_rate"` keeps what was learned and only
    starts the learning-rate schedule again (Renda et al. 2020, arXiv:2003.02389).

    `max_epochs` of the Trainer is the length of *one* training, which the learning-rate schedule spans as it would
    without pruning; the callback makes the fit longer: `max_epochs` + `num_levels` * (`max_epochs` - `epoch`) epochs in
    all. With `step`, a level trains as many steps as the first training had left, at their learning rates: its first
    epoch is that in which `step` lies, shorter by the batches before it; the data are those of a new epoch, from the
    first batch on. Weights, buffers, optimizers and schedules are set back when a level begins, and averages of the
    weights begin anew, so that the checkpoint at the end of each level holds what was trained in it; the snapshot
    travels in every checkpoint, and a run resumed at any level goes on bit for bit. `levels` has the metrics at the end
    of each. Callbacks that go by the number of the epoch, as GradientAccumulationScheduler does, count those of the
    whole fit: they do not begin anew.

    Cost: `num_levels` further trainings; a copy of weights and optimizer state in memory and in checkpoints.

    When: to look for sparse networks that train as well as dense ones, or, with "learning_rate", for the best accuracy
        at a sparsity where training time does not matter.

    Args:
        sparsity: fraction of the groups removed in the end, in [0, 1); numbers by name pattern; None where the scope
            prescribes it.
        num_levels: how often it is pruned and trained again, at least 1.
        rewind: what goes back, "weights" (all of the run) or the "learning_rate" alone.
        epoch: the epoch that the run goes back to the beginning of, below `max_epochs`; 0 is the initialisation.
        step: given in place of `epoch`; the run goes back to where it was after so many optimizer steps, fewer than the
            first training has, with data of a known length; 0 is the initialisation.
        criterion: how good each weight is, by value or name: it is asked between two trainings, where no data is seen.
        granularity: what goes as one piece, of single tensors.
        scope: who competes with whom.
        include: patterns or module types to prune; by default the linear, convolution and attention weights that are
            trained.
        exclude: patterns or module types to leave out.
        report: whether to write `report.json` and `report.md` beside the run.
        compact: whether optimizers step the surviving weights alone where that is faster (very sparse, on CPU): same
            result, cheaper steps, less memory; `optimizer.state` holds vectors of the survivors meanwhile.

    Raises:
        ValueError: a value out of its range, at once; a Trainer without `max_epochs`, or with fewer steps, before the
            first step.

    Example:
        >>> from lightning_prune import WeightRewinding
        >>> WeightRewinding(sparsity=0.9, num_levels=10, epoch=1).describe()["epoch"]
        '1'
        >>> WeightRewinding(sparsity=0.9, num_levels=10, step=500).describe()["step"]
        '500'
    """

    kind = "rewinding"

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        num_levels: int = 5,
        rewind: str = "weights",
        epoch: int = 0,
        step: int | None = None,
        criterion: Criterion = Magnitude(),
        granularity: Granularity | Couples = Weight(),
        scope: Scope = Global(),
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] = (),
        report: bool = True,
        compact: bool = True,
    ) -> None:
        self.chosen = RewindingRecipe(
            sparsity, criterion, granularity, scope, include, exclude, num_levels, rewind, epoch, step
        )
        super().__init__(
            self.chosen.plain, schedule=Constant(), window=Window(end=0.0), report=report, compact=compact
        )
        self.level = 0
        self.levels: list[dict[str, float]] = []
        """Level, sparsity and the metrics at its end, of all levels that are done."""
        self.snapshot: Snapshot | None = None
        self.course = Course(num_levels, epoch)

    @property
    def is_final(self) -> bool:
        """Whether this is the last training."""
        return self.level == self.chosen.num_levels

    @property
    def unguarded(self) -> str | None:
        """Why updates cannot be watched and undone by a guard."""
        return "which prunes between two trainings, and goes back to the weights of before by itself"

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        nouns = {n: text for n, text in super().describe().items() if n not in ("schedule", "window")}
        return nouns | self.chosen.describe()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose sparsity, or a model whose weights of before would not fit it any more.

        Raises:
            ValueError: a strategy under which masks would be lost, a callback that makes the model smaller, or another
                one that lengthens the fit.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and any(isinstance(other, WeightRewinding) for other in partners(self, trainer)):
            raise ValueError(
                "`callbacks` has one WeightRewinding, which makes the fit as long as its levels, but got two: prune "
                "all by one, with numbers by name pattern as its `sparsity`, or one after the other in two fits."
            )
        if stage == "fit" and self.chosen.rewind == "weights":
            check_same_size(self, trainer, "goes back to the weights of before")
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and any(isinstance(c, StochasticWeightAveraging) for c in callbacks):
            raise ValueError(
                "`callbacks` with WeightRewinding go back with the learning rates, but got StochasticWeightAveraging, "
                "which exchanges their scheduler in the first training: average by EMAWeightAveraging."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the fit as long as all levels together, and go on from what was loaded.

        Raises:
            ValueError: the Trainer does not count in epochs, or `epoch` is none of its.
        """
        length, is_trial = trainer.max_epochs, bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if length is None or length < 1 or (trainer.max_steps != -1 and not is_trial):
            raise ValueError(
                f"`max_epochs` is the length of one training, at least 1, and `max_steps` is not set, but got "
                f"{length} and {trainer.max_steps}."
            )
        if self.chosen.step is None and not is_trial:
            self.chosen.start(length, math.inf)
        is_resumed = self._loaded is not None
        super().on_fit_start(trainer, pl_module)
        if self._before is None:
            self.level, self.levels, self.snapshot = 0, [], None
            self.course = Course(self.chosen.num_levels, self.chosen.epoch)
        self.course.length = length
        if is_resumed or self.level < self.chosen.num_levels:  # a second fit only trains what is left
            trainer.fit_loop.max_epochs = self.course.end(self.chosen.num_levels)

    def _restore_(self, state: dict[str, Any]) -> None:
        if state["snapshot"] is not None and state["place"] != self.chosen.place:
            raise ValueError(
                f"`epoch` or `step` is that of the run that is resumed, {state['place']}, of which it has a snapshot, "
                f"but got {self.chosen.place}."
            )
        super()._restore_(state)
        self.level, self.levels, self.snapshot = state["level"], list(state["levels"]), state["snapshot"]
        self.course.load_state_dict(state["course"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count on from where the run was.

        Raises:
            ValueError: `step` is none of the first training, or a run that was dense so far is past it.
        """
        if self.chosen.step is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.chosen.start(self.course.length, steps_per_epoch(trainer))
        self.ramp = Ramp(self.schedule, StepWindow(0, 0, 1), steps_done(trainer))
        if self._before is not None:
            self._go_along(self.ramp, self._before)
        self.ramp.is_due = False
        self.course.go_on_(trainer)
        self._check_is_ahead(trainer)

    def _check_is_ahead(self, trainer: L.Trainer) -> None:
        """Refuse to go on where no snapshot was taken and none will be."""
        step, num_done = self.chosen.step, self._ramp.num_steps
        is_past = trainer.current_epoch > self.chosen.epoch if step is None else num_done > step
        if self.snapshot is None and is_past:
            name = "epoch" if step is None else "step"
            raise ValueError(
                f"`{name}` is ahead of the run that is resumed, which was dense so far and is in epoch "
                f"{trainer.current_epoch} after {num_done} steps, but got {getattr(self.chosen, name)}."
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the snapshot, or prune and go back to it, where a level begins."""
        self._begin_level_(trainer, pl_module)
        self.course.cut_(trainer, trainer.current_epoch)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *rest: Any
    ) -> None:
        """Do the same within an epoch, or where one begins in a resumed run, which does not always say so."""
        self._begin_level_(trainer, pl_module, trainer.fit_loop.epoch_loop.batch_idx)
        self.course.begin_(trainer)
        super().on_train_batch_start(trainer, pl_module, batch, *rest)

    def _begin_level_(self, trainer: L.Trainer, pl_module: L.LightningModule, num_batches: int = 0) -> None:
        if self.level < self.chosen.num_levels and trainer.current_epoch >= self.course.end(self.level):
            self._note_level({})
            self.level += 1
            self._prune_()
            self._rewind_(trainer, pl_module)
        elif self.snapshot is None and self._is_at_start(trainer):
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self.snapshot = take(pl_module, trainer.optimizers, schedulers)
            if self.chosen.step is not None:
                self.course.start_at_(trainer.current_epoch, num_batches)
                trainer.fit_loop.max_epochs = self.course.end(self.chosen.num_levels)

    def _is_at_start(self, trainer: L.Trainer) -> bool:
        step = self.chosen.step
        return trainer.current_epoch == self.chosen.epoch if step is None else self._ramp.num_steps == step

    def _rewind_(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.snapshot is None:  # manual optimization may step less often than once a batch
            raise ValueError(
                f"`step` is one of the first training's, which took {self._ramp.num_steps}, but got {self.chosen.step}."
            )
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        is_back = self.chosen.rewind == "weights"
        rewind_(self.snapshot, pl_module, trainer.optimizers, schedulers, weights=is_back)
        self._pruner.apply_()
        mask_all_(self, trainer)
        restart_averages_(trainer, pl_module)
        mask_state_(self._optimizers, self._pruner.targets, self._pruner.masks)

    def _prune_(self) -> None:
        final = self._pruner.final_sparsity
        fraction = self.chosen.sparsity_at(self.level, final) / final if final else 0.0
        self._update_(fraction, step=self._ramp.num_steps, progress=self.level / self.chosen.num_levels)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write down what a level has come to."""
        self.course.cut_(trainer, trainer.current_epoch + 1)  # before a progress bar asks how long it is
        if trainer.current_epoch + 1 == self.course.end(self.level):
            found = trainer.callback_metrics.items()
            self._note_level({name: float(value) for name, value in found if value.numel() == 1})

    def _note_level(self, metrics: dict[str, float]) -> None:
        """Write down a level once; one whose end was lost with a killed process has no metrics."""
        if len(self.levels) == self.level:
            self.levels.append({"level": float(self.level), "sparsity": self._pruner.sparsity} | metrics)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a resumed run start the epoch after a short one with its first batch."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self.course.forget_loaders_(trainer, checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so where training stopped before the last level."""
        super().on_train_end(trainer, pl_module)
        if self.level < self.chosen.num_levels:
            where = f"level {self.level} of {self.chosen.num_levels}"
            self._warn(f"Training stopped in {where}: sparsity is {self._pruner.sparsity:.4f}.")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the Trainer its own length back."""
        super().teardown(trainer, pl_module, stage)
        if self.course.length:
            trainer.fit_loop.max_epochs, self.course.length = self.course.length, 0

    def state_dict(self) -> dict[str, Any]:
        """Return masks, updates, levels and the snapshot, safe under `torch.load(weights_only=True)`."""
        own = {"level": self.level, "levels": list(self.levels), "snapshot": self.snapshot}
        own |= {"place": self.chosen.place, "course": self.course.state_dict()}
        return {**super().state_dict(), **own} if self.pruner is not None else super().state_dict()

    def _update_if_due(self) -> None:
        """Do nothing: levels begin with epochs."""
