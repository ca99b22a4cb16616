"""How a trained model is pruned on calibration batches: measured, chosen, solved for, and made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.evaluation import NUM_EXAMPLES, calibration_batches
from lightning_prune.callbacks.interruption import going_on
from lightning_prune.callbacks.own_steps import loss_of, run_steps, silenced, step_of
from lightning_prune.callbacks.structure import averaged_models
from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.solvers import needs_of
from lightning_prune.core.types import Couples, Solver
from lightning_prune.graph.sandbox import eager
from lightning_prune.model.averages import Copies
from lightning_prune.model.calibration import calibrate, reestimate_batch_norm_
from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.layerwise import check_solver
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.rounds import prune_in_rounds_
from lightning_prune.model.solving import make_up_
from lightning_prune.model.stages import lists_in
from lightning_prune.model.statistics import needs_loss
from lightning_prune.model.unfinished import Unfinished
from lightning_prune.model.unpruned import layers_left_out
from lightning_prune.report.progress import showing


class CalibratedPruning(PruningCallback):
    """Base of the callback that prunes in one shot: `_prune_` does all of it, the callback says when.

    Its settings are those of `PostTrainingPruning`.
    """

    num_calibration_batches: int
    num_rounds: int
    reestimate_batch_norm: bool
    solver: Solver | None
    blocks: str | None
    unfinished: str | Path | None
    copies: Copies | None = None
    """What training has shown of averages within the module, where it was seen."""

    @property
    def _needs_loss(self) -> bool:
        """Whether the criterion or the solver asks for gradients of the loss."""
        by_gradients = self.solver is not None and "gradients" in needs_of(self.solver)
        return by_gradients or needs_loss(required_statistics(self.recipe.criterion))

    def _check_fits(self, module: L.LightningModule) -> None:
        """Refuse a recipe that does not fit the model, before anything is loaded or run."""
        if isinstance(self.recipe.granularity, Couples):
            return
        pruner = Pruner(module, self.recipe)
        if self.solver is not None:
            check_solver(self.solver, pruner)
            lists_in(module, self.blocks)

    def _prune_(self, trainer: L.Trainer, module: L.LightningModule, loader: Any) -> None:
        is_coupled = isinstance(self.recipe.granularity, Couples)
        if is_coupled:
            loader = loader() if callable(loader) else loader
            found = (
                batch for num in (1, NUM_EXAMPLES) for batch in calibration_batches(trainer, loader, num)
            )
            self.pruner = self._coupled(trainer, module, found)
            if (
                self.copies is not None
                and self.copies.model is module
                and not isinstance(self.pruner, Pruner)
            ):
                self.pruner.copies = self.copies
        else:
            self.pruner = Pruner(module, self.recipe)
            self._warn(*layers_left_out(module, self.recipe, self.pruner.targets))
        statistics = self.pruner.statistics
        needs_data = (
            statistics.activations or statistics.gradients or self.reestimate_batch_norm or self.solver
        )
        batches: Sequence[Any] = ()
        if needs_data:
            loader = loader() if callable(loader) else loader
            batches = calibration_batches(trainer, loader, self.num_calibration_batches)
        words = {"blocks": str(self.blocks), "num_rounds": str(self.num_rounds), **self.describe()}
        begun = going_on(trainer, self.pruner, words, batches, self.unfinished)
        with silenced(module), showing(), eager(), begun as unfinished:
            choose_ = partial(self._choose_, trainer, module, batches, unfinished)
            is_told = run_steps(module, batches, statistics, choose_)
            if is_coupled:
                self._shrink_(trainer, module, trainer.optimizers, averaged_models(trainer))
            if self.reestimate_batch_norm:
                reestimate_batch_norm_(module, batches, forward=step_of(module, batches, is_told=is_told))

    def _choose_(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batches: Sequence[Any],
        unfinished: Unfinished | None,
        is_told: bool,
    ) -> None:
        """Calibrate, choose, and let the solver change what stays."""
        assert self.pruner is not None
        loss = loss_of(module, batches, is_told=is_told) if self._needs_loss else None
        forward = step_of(module, batches, is_told=is_told)
        how: dict[str, Any] = {"forward": forward, "loss": loss, "unfinished": unfinished}
        measure = partial(calibrate, self.pruner.statistics, module, batches, **how)
        when: dict[str, Any] = {"step": trainer.global_step, "progress": 1.0}
        if self.solver is None:
            update_ = partial(self._update_, **when)
            prune_in_rounds_(self.pruner, self.num_rounds, measure, update_=update_, unfinished=unfinished)
            return
        measure()
        self.pruner.choose_(1.0)
        assert not isinstance(self.pruner, DepthPruner)
        make_up_(self.pruner, self.solver, batches, blocks=self.blocks, **how)
        self._note_update(1.0, **when)
