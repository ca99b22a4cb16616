"""Pruning a trained model in one shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L

from lightning_prune.callbacks.best_weights import check_has_best, load_best_
from lightning_prune.callbacks.calibrated import CalibratedPruning
from lightning_prune.callbacks.evaluation import as_metrics, builds_late, examples, validate_within_fit
from lightning_prune.callbacks.interruption import folder_of
from lightning_prune.callbacks.own_steps import loss_of
from lightning_prune.callbacks.ownership import check_alone, check_same_size, mask_all_
from lightning_prune.callbacks.structure import check_comes_back, copy_to_averages_, follow_record_
from lightning_prune.callbacks.trial import check_flow
from lightning_prune.core.budgets import Budget
from lightning_prune.core.checks import check_choice, check_count, check_path
from lightning_prune.core.criteria import check_can_calibrate
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Weight
from lightning_prune.core.recipe import Recipe, as_text, checked_rounds, checked_solver
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import Couples, Criterion, Granularity, Scope, Solver
from lightning_prune.model.averages import Copies
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shrinking import AnyPruner
from lightning_prune.model.unfinished import check_left

FILE_NAME = "pruned.ckpt"


class PostTrainingPruning(CalibratedPruning):
    """Prune a trained model in one shot: when `fit` ends, or with `run` on a checkpoint, without training.

    The model is validated before and after, and saved as `pruned.ckpt` beside the other checkpoints. Criteria by
    activations or gradients are calibrated on training batches, through the module's own `training_step` in eval mode;
    where it fails there and not in training, as a detector's does, the module is told that it trains, though dropout
    and batch norms are not.

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
    Averages of weights that the module itself holds become smaller too, where training shows them to be averages, or
    where it is certain: `AveragedModel`, and copies that no step runs. Others stay whole, and it is said.

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
        self._is_tried, self._watching = False, ExitStack()
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
        if stage == "fit" and isinstance(self.recipe.granularity, Couples):
            advice = "train with strategy='ddp', or prune the trained model by PostTrainingPruning.run."
            check_comes_back(trainer, f"`granularity` is {self.recipe.granularity}", advice)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before training what would only fail after it.

        Raises:
            ValueError: the recipe does not fit the model, what is to go on is not there, or there will be no best
                checkpoint.
        """
        self._is_tried, self.copies = False, None
        self._check_fits(pl_module)
        if self._needs_loss:
            loss_of(pl_module)
        if self.unfinished is not None:
            check_left(self.unfinished)
        if self.checkpoint == "best":
            check_has_best(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check before the first step what shows only in a call: which groups there are, which copies, and the flow.

        Raises:
            ValueError: the recipe does not fit the model.
        """
        if not self._is_tried:
            pruner: AnyPruner
            if isinstance(self.recipe.granularity, Couples):
                pruner = self._coupled(trainer, pl_module, examples(trainer, batch))
                check_alone(self, trainer, pruner)
                assert not isinstance(pruner, Pruner)
                self._watch(pruner.copies, trainer)
            else:
                pruner = Pruner(pl_module, self.recipe)
            check_flow(pl_module, pruner.statistics, next(examples(trainer, batch)))
        self._is_tried = True

    def _watch(self, copies: Copies, trainer: L.Trainer) -> None:
        """See from now on which copies within the module change, are run, or are trained."""
        self.copies = copies
        copies.watch(trains_on=False)
        self._watching.callback(copies.close)
        for optimizer in trainer.optimizers:
            hook = optimizer.register_step_post_hook(lambda *_: copies.note_gradients())
            self._watching.callback(hook.remove)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._watching.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Leave no hook behind."""
        self._watching.close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune what was trained, validate it before and after, and save it."""
        if self.checkpoint == "best":
            load_best_(trainer, pl_module)
            mask_all_(self, trainer)
        self.metrics_before = validate_within_fit(trainer)
        self._prune_(trainer, pl_module, trainer.train_dataloader)
        copy_to_averages_(trainer, pl_module)  # which validation and checkpoints put in the module's place
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
            trainer: validates, and says where files go; its `limit_train_batches` is for training, how much data
                calibrates is said by `num_calibration_batches`.
            model: the module; its weights are loaded from `ckpt_path` if that is given.
            datamodule: its validation data measures, its training data calibrates; without it, the module's own.
            ckpt_path: a checkpoint of the dense model.

        Returns:
            The metrics after pruning.

        Raises:
            ValueError: what is no datamodule, a recipe that does not fit the model, calibration data that is missing,
                or a model whose `setup` builds its network anew each time.
            UnpicklingError: the checkpoint holds more than tensors and plain data, which is not run.
        """
        if not isinstance(trainer, L.Trainer) or not isinstance(model, L.LightningModule):
            raise ValueError(
                f"`trainer` and `model` are a Trainer and a LightningModule, in this order, but got "
                f"{type(trainer).__name__} and {type(model).__name__}."
            )
        if datamodule is not None and not hasattr(datamodule, "train_dataloader"):
            raise ValueError(
                "`datamodule` gives training batches, to calibrate on, and validation batches, to measure with, but "
                f"got a {type(datamodule).__name__}: give a LightningDataModule that has both loaders, or none where "
                "the model has them itself."
            )
        is_late = builds_late(model)
        if not is_late:  # or else the network is there once the trainer has called them
            self._check_fits(model)
        follow_record_(model)
        self._arrange(trainer, model, "fit")
        self.metrics_before = as_metrics(
            trainer.validate(model, datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True)
        )
        if is_late:
            self._check_fits(model)
        if datamodule is not None:
            datamodule.setup("fit")
        source = datamodule if datamodule is not None else model
        model.to(trainer.strategy.root_device)
        self._prune_(trainer, model, source.train_dataloader)
        copy_to_averages_(trainer, model)
        self.metrics_after = as_metrics(trainer.validate(model, datamodule, verbose=False))
        self._check_is_there(model)
        self._save(trainer)
        self._finish_report(trainer, model)
        return self.metrics_after

    def _check_is_there(self, model: L.LightningModule) -> None:
        if not self._is_of(model):
            raise ValueError(
                f"`setup` of {type(model).__name__} builds what is not there yet, since it is called before each "
                "validation, but it has put another network in the place of the pruned one."
            )

    def _save(self, trainer: L.Trainer) -> None:
        self.path = str(folder_of(trainer) / FILE_NAME)
        trainer.save_checkpoint(self.path)
