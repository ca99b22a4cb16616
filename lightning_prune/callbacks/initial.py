"""Pruning before training: masks of the first weights, held through the whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from lightning_prune.callbacks.evaluation import training_batches
from lightning_prune.callbacks.in_training import InTraining
from lightning_prune.callbacks.interruption import going_on
from lightning_prune.callbacks.own_steps import loss_of, run_steps, silenced, step_of
from lightning_prune.callbacks.ownership import check_alone
from lightning_prune.callbacks.structure import averaged_models, check_can_shrink
from lightning_prune.core.budgets import Budget
from lightning_prune.core.checks import check_count, check_path
from lightning_prune.core.criteria import check_can_calibrate, required_statistics
from lightning_prune.core.criteria.gradients import Saliency
from lightning_prune.core.granularities import Weight
from lightning_prune.core.ramp import Ramp
from lightning_prune.core.recipe import Recipe, checked_rounds, checked_shrink
from lightning_prune.core.schedules import Constant
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import Couples, Criterion, Granularity, Scope
from lightning_prune.core.windows import StepWindow, Window
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.calls import random_states_kept
from lightning_prune.model.optimizer import mask_state_, trained_ids
from lightning_prune.model.rounds import prune_in_rounds_
from lightning_prune.model.statistics import needs_loss
from lightning_prune.model.unfinished import Unfinished
from lightning_prune.report.progress import showing


class InitialPruning(InTraining):
    """Prune before the first step, and train what is left: masks are found on a few batches and held from then on.

    By default SNIP, Lee et al. 2018 (arXiv:1810.02340): the saliency of the weights at initialisation, all at once.
    With other criteria it is GraSP or SynFlow, in rounds iterative SNIP or FORCE (the recipes have these names). A run
    that starts from a checkpoint of dense weights is pruned where it starts.

    The batches go through the module's own `training_step`, without dropout, and batch norms normalise by each batch,
    as they will in training; the order of the training data and all random states are as they would be without.

    Cost: `num_rounds` times `num_calibration_batches` times the passes of the criterion, before training; one byte per
    weight after.

    When: training itself is to be sparse from its first step; after training, or while it runs, weights can be chosen
    better.

    Args:
        sparsity: fraction of the groups removed, in [0, 1); numbers by name pattern; None where the scope prescribes
            it.
        criterion: how good each weight is.
        granularity: what goes as one piece.
        scope: who competes with whom.
        num_calibration_batches: how many training batches are read, at least 1, on each process.
        num_rounds: in how many rounds density falls to its end, by the same factor in each; at least 1.
        revive: whether what a round has pruned may come back in a later one, as in FORCE.
        include: patterns or module types to prune; by default the linear, convolution and attention weights that are
            trained.
        exclude: patterns or module types to leave out.
        report: whether to write `report.json` and `report.md` beside the run.
        shrink: for coupled granularities, whether what is masked is taken out of the model for real before training: at
            the "end" of the rounds (the default), or "never".
        budget: for coupled granularities, what the smaller model may cost, in place of `sparsity`.
        unfinished: the folder that an interrupted pruning has left, to go on from: sums of calibration, and rounds. By
            default `unfinished` beside the checkpoints; it is removed in the end.
        compact: whether optimizers step the surviving weights alone where that is faster (very sparse, on CPU): same
            result, cheaper steps, less memory; `optimizer.state` holds vectors of the survivors meanwhile.

    Raises:
        ValueError: a value out of its range, at once; what does not fit model or trainer, before the first step.

    Example:
        >>> from lightning_prune import InitialPruning, SynFlow
        >>> InitialPruning(sparsity=0.99, criterion=SynFlow(), num_rounds=100).describe()["num_rounds"]
        '100'
    """

    kind = "initial"

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        criterion: Criterion = Saliency(),
        granularity: Granularity | Couples = Weight(),
        scope: Scope = Global(),
        num_calibration_batches: int = 4,
        num_rounds: int = 1,
        revive: bool = False,
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] = (),
        report: bool = True,
        shrink: str | None = None,
        budget: Budget | None = None,
        unfinished: str | Path | None = None,
        compact: bool = True,
    ) -> None:
        recipe = Recipe(sparsity, criterion, granularity, scope, include, exclude, budget)
        super().__init__(recipe, schedule=Constant(), window=Window(end=0.0), report=report, compact=compact)
        check_can_calibrate(criterion)
        self.shrink = checked_shrink(shrink, granularity, choices=("end", "never"))
        self.holds_masks, self.turn = self.shrink != "end", int(self.shrink != "end")
        self.num_calibration_batches = check_count(
            "num_calibration_batches", num_calibration_batches, minimum=1
        )
        self.unfinished = None if unfinished is None else check_path("unfinished", unfinished)
        self.num_rounds, self.revive = checked_rounds(num_rounds, revive, budget), revive

    @property
    def unguarded(self) -> str | None:
        """Why updates cannot be watched and undone by a guard."""
        return "which prunes once, before training starts"

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        nouns = {
            name: text for name, text in super().describe().items() if name not in ("schedule", "window")
        }
        own = {name: str(getattr(self, name)) for name in ("num_calibration_batches", "num_rounds", "revive")}
        return {**nouns, **own, **({"shrink": self.shrink} if self.shrink is not None else {})}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose sparsity, what no loss can be had of, or could not follow a smaller model.

        Raises:
            ValueError: a strategy that shards the weights or whose processes could not follow, or manual optimization
                where the criterion needs gradients.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.shrink == "end":
            check_can_shrink(trainer, self.shrink)
        if stage == "fit" and needs_loss(required_statistics(self.recipe.criterion)):
            loss_of(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune, unless the run goes on from where that was done."""
        num_done = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self._before is not None and "ramp" in self._before:
            self._go_along(Ramp(self.schedule, StepWindow(0, 0, 1)), self._before)
        else:
            self.ramp = Ramp(self.schedule, StepWindow(num_done, num_done, 1), num_done)
            self._prune_(trainer, pl_module)

    def _prune_(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        with random_states_kept(module.device), silenced(module), showing():
            batches = training_batches(trainer, self.num_calibration_batches)
            if self.pruner is None:
                self.pruner = self._coupled(trainer, module, batches, trained_ids(trainer.optimizers))
                check_alone(self, trainer)
            with going_on(trainer, self.pruner, self.describe(), batches, self.unfinished) as unfinished:
                choose_ = partial(self._choose_, module, batches, unfinished)
                run_steps(module, batches, self.pruner.statistics, choose_)
                if self.shrink == "end":
                    self._shrink_(trainer, module, self._optimizers, averaged_models(trainer))
        self._ramp.is_due, self._is_news = False, True

    def _choose_(
        self, module: L.LightningModule, batches: list[Any], unfinished: Unfinished | None, is_told: bool
    ) -> None:
        statistics = self._pruner.statistics
        loss = loss_of(module, batches, is_told=is_told) if statistics.needs_loss else None
        forward = step_of(module, batches, is_told=is_told)
        how: dict[str, Any] = {"forward": forward, "loss": loss, "batch_statistics": True}
        measure = partial(calibrate, statistics, module, batches, unfinished=unfinished, **how)
        rounds: dict[str, Any] = {
            "revive": self.revive,
            "update_": partial(self._update_, step=self._ramp.num_steps, progress=1.0),
            "unfinished": unfinished,
        }
        prune_in_rounds_(self._pruner, self.num_rounds, measure, **rounds)
        mask_state_(self._optimizers, self._pruner.targets, self._pruner.masks)

    def _update_if_due(self) -> None:
        """Do nothing: there is one update, and it is done when training starts."""
