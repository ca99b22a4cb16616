"""Pruning a trained model in one shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.evaluation import (
    as_metrics,
    calibration_batches,
    loss_of,
    silenced,
    step_of,
    validate_within_fit,
)
from lightning_prune.callbacks.interruption import folder_of, going_on
from lightning_prune.callbacks.ownership import check_alone, check_same_size, mask_all_
from lightning_prune.callbacks.structure import follow_record_
from lightning_prune.callbacks.trial import check_flow
from lightning_prune.core.budgets import Budget
from lightning_prune.core.checks import check_choice, check_count, check_path
from lightning_prune.core.criteria import check_can_calibrate, required_statistics
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Weight
from lightning_prune.core.recipe import Recipe, as_text, checked_rounds, checked_solver
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.solvers import needs_of
from lightning_prune.core.types import Couples, Criterion, Granularity, Scope, Solver
from lightning_prune.model.calibration import calibrate, reestimate_batch_norm_
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.layerwise import check_solver, solve_
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.reconstruction import reconstruct_
from lightning_prune.model.rounds import prune_in_rounds_
from lightning_prune.model.shrinking import AnyPruner
from lightning_prune.model.stages import lists_in
from lightning_prune.model.statistics import needs_loss
from lightning_prune.model.unfinished import Unfinished, check_left
from lightning_prune.model.whole import read_checkpoint
from lightning_prune.report.progress import showing, steps

FILE_NAME = "pruned.ckpt"


class PostTrainingPruning(PruningCallback):
    """Prune a trained model in one shot: when `fit` ends, or with `run` on a checkpoint, without training.

    The model is validated before and after, and saved as `pruned.ckpt` beside the other checkpoints. Criteria by
    activations or gradients are calibrated on training batches, through the module's own `training_step`.

    Cost: the passes of the criterion over the calibration batches, and those of the solver; two validations.

    When: the model is trained already, and training it again is out of the question.

    Args:
        sparsity: fraction of the groups removed, in [0, 1); numbers by name pattern; None where the scope prescribes
            it.
        criterion: how good each weight is; with `Layer`, the default stands for the influence of blocks.
        granularity: what goes as one piece.
        scope: who competes with whom.
        include: patterns or module types to prune; by default the linear, convolution and attention weights.
        exclude: patterns or module types to leave out.
        checkpoint: what to prune when `fit` ends: the "last" weights, or those of the "best" checkpoint.
        num_calibration_batches: how many training batches to calibrate on, at least 1.
        num_rounds: in how many rounds density falls to its end, by the same factor in each, with statistics of what the
            round before has left; at least 1.
        reestimate_batch_norm: whether batch-norm statistics are computed anew on those batches, after pruning.
        report: whether to write `report.json` and `report.md` beside the run.
        budget: for coupled granularities (`Channel`, `Head`, `Layer`), what the smaller model may cost, in place of
            `sparsity`.
        solver: how the weights that stay make up for those that go, layer by layer, on the calibration batches; for
            channels and heads `LeastSquares()`.
        blocks: for a solver, path of the module whose children run one after the other, as decoder layers do; by
            default the longest such chain, and without one each layer by itself.
        unfinished: the folder that an interrupted pruning has left, to go on from: sums of calibration, rounds, layers
            that the solver is done with. By default `unfinished` beside the checkpoints; it is removed in the end.

    Coupled granularities, `Layer` among them, take out what they prune: the model is physically smaller afterwards.

    Raises:
        ValueError: a value out of its range, at once; what does not fit the model, before any weight is changed.

    Example:
        >>> from lightning_prune import PerRow, PostTrainingPruning, Wanda
        >>> PostTrainingPruning(sparsity=0.5, criterion=Wanda(), scope=PerRow()).describe()["criterion"]
        'Wanda()'
    """

    kind = "post_training"

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        criterion: Criterion = Magnitude(),
        granularity: Granularity | Couples = Weight(),
        scope: Scope = Global(),
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] = (),
        checkpoint: str = "last",
        num_calibration_batches: int = 16,
        num_rounds: int = 1,
        reestimate_batch_norm: bool = False,
        report: bool = True,
        budget: Budget | None = None,
        solver: Solver | None = None,
        blocks: str | None = None,
        unfinished: str | Path | None = None,
    ) -> None:
        recipe = Recipe(sparsity, criterion, granularity, scope, include, exclude, budget)
        super().__init__(recipe, report=report)
        check_can_calibrate(criterion)
        self.checkpoint = check_choice("checkpoint", checkpoint, ("last", "best"))
        self.num_calibration_batches = check_count(
            "num_calibration_batches", num_calibration_batches, minimum=1
        )
        self.num_rounds = checked_rounds(num_rounds, budget=budget)
        self.reestimate_batch_norm = reestimate_batch_norm
        self.solver = checked_solver(solver, granularity, blocks, num_rounds)
        self.blocks = blocks
        self.unfinished = None if unfinished is None else check_path("unfinished", unfinished)
        self._is_tried = False
        self.turn = 2 if isinstance(granularity, Couples) else 3

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        return super().describe() | ({"solver": as_text(self.solver)} if self.solver is not None else {})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose sparsity, or a best checkpoint that may be of a larger model.

        Raises:
            ValueError: a strategy under which masks would be lost, or a callback that makes the model smaller.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.checkpoint == "best":
            check_same_size(self, trainer, "loads the best checkpoint")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before training what would only fail after it.

        Raises:
            ValueError: the recipe does not fit the model, what is to go on is not there, or there will be no best
                checkpoint.
        """
        self._check_fits(pl_module)
        if self._needs_loss:
            loss_of(pl_module)
        if self.unfinished is not None:
            check_left(self.unfinished)
        monitored = (
            isinstance(trainer.checkpoint_callback, ModelCheckpoint) and trainer.checkpoint_callback.monitor
        )
        if self.checkpoint == "best" and not monitored:
            raise ValueError(
                '`checkpoint` is "best" only with a ModelCheckpoint(monitor=...), but the Trainer has none.'
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check before the first step what shows only in a call of the model: which groups there are, and the flow.

        Raises:
            ValueError: the recipe does not fit the model.
        """
        if not self._is_tried:
            pruner: AnyPruner
            if isinstance(self.recipe.granularity, Couples):
                check_alone(self, trainer, pruner := self._coupled(trainer, pl_module, batch))
            else:
                pruner = Pruner(pl_module, self.recipe)
            check_flow(pl_module, pruner.statistics, batch)
        self._is_tried = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune what was trained, validate it before and after, and save it."""
        if self.checkpoint == "best" and isinstance(callback := trainer.checkpoint_callback, ModelCheckpoint):
            if not callback.best_model_path:
                raise ValueError(
                    '`checkpoint` is "best", but no checkpoint was saved: there was no validation.'
                )
            best = read_checkpoint(callback.best_model_path, pl_module.device)
            pl_module.load_state_dict(best["state_dict"])
            mask_all_(self, trainer)
        self.metrics_before = validate_within_fit(trainer)
        self._prune_(trainer, pl_module, trainer.train_dataloader)
        self.metrics_after = validate_within_fit(trainer)
        if trainer.checkpoint_callback is not None:
            self._save(trainer)

    def run(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
    ) -> dict[str, float]:
        """Prune a trained model without training: validate, prune in place, validate again, save, report.

        Args:
            trainer: validates, and says where files go.
            model: the module; its weights are loaded from `ckpt_path` if that is given.
            datamodule: its validation data measures, its training data calibrates; without it, the module's own.
            ckpt_path: a checkpoint of the dense model.

        Returns:
            The metrics after pruning.

        Raises:
            ValueError: the recipe does not fit the model, or calibration data is missing.
            UnpicklingError: the checkpoint holds more than tensors and plain data, which is not run.
        """
        self._check_fits(model)
        follow_record_(model)
        self._arrange(trainer, model, "fit")
        self.metrics_before = as_metrics(
            trainer.validate(model, datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True)
        )
        if datamodule is not None:
            datamodule.setup("fit")
        source = datamodule if datamodule is not None else model
        model.to(trainer.strategy.root_device)
        self._prune_(trainer, model, source.train_dataloader)
        self.metrics_after = as_metrics(trainer.validate(model, datamodule, verbose=False))
        self._save(trainer)
        self._finish_report(trainer, model)
        return self.metrics_after

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
            self.pruner = self._coupled(trainer, module, calibration_batches(trainer, loader, 1)[0])
        else:
            self.pruner = Pruner(module, self.recipe)
        statistics = self.pruner.statistics
        needs_data = (
            statistics.activations or statistics.gradients or self.reestimate_batch_norm or self.solver
        )
        batches: Iterable[Any] = ()
        if needs_data:
            loader = loader() if callable(loader) else loader
            batches = calibration_batches(trainer, loader, self.num_calibration_batches)
        words = {"blocks": str(self.blocks), "num_rounds": str(self.num_rounds), **self.describe()}
        begun = going_on(trainer, self.pruner, words, batches, self.unfinished)
        with silenced(module), showing(), begun as unfinished:
            self._choose_(trainer, module, batches, unfinished)
            if is_coupled:
                self._shrink_(trainer, module)
            if self.reestimate_batch_norm:
                reestimate_batch_norm_(module, batches, forward=step_of(module))

    def _choose_(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batches: Iterable[Any],
        unfinished: Unfinished | None,
    ) -> None:
        """Calibrate, choose, and let the solver change what stays."""
        assert self.pruner is not None
        loss = loss_of(module) if self._needs_loss else None
        how: dict[str, Any] = {"forward": step_of(module), "loss": loss, "unfinished": unfinished}
        measure = partial(calibrate, self.pruner.statistics, module, batches, **how)
        when: dict[str, Any] = {"step": trainer.global_step, "progress": 1.0}
        if self.solver is None:
            update_ = partial(self._update_, **when)
            prune_in_rounds_(self.pruner, self.num_rounds, measure, update_=update_, unfinished=unfinished)
            return
        measure()
        self.pruner.choose_(1.0)
        how |= {"blocks": self.blocks}
        how |= {"progress": partial(steps, what=f"{type(self.solver).__name__}, layer by layer")}
        if isinstance(self.pruner, Pruner):
            solve_(self.pruner, self.solver, batches, **how)
            self.pruner.apply_()
        elif isinstance(self.pruner, GroupPruner):
            with ExitStack() as undo:
                rest = {name: how[name] for name in ("forward", "blocks", "progress")}
                reconstruct_(self.pruner, self.solver, batches, undo, **rest)
                undo.pop_all()
            self.pruner.mask_()
        self._note_update(1.0, **when)

    def _save(self, trainer: L.Trainer) -> None:
        self.path = str(folder_of(trainer) / FILE_NAME)
        trainer.save_checkpoint(self.path)
