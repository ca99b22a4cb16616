"""The best checkpoint and the end of training, chosen among models that are as sparse as they are to be."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.core.checks import did_you_mean


def check_is_logged(monitor: str, known: Iterable[str]) -> None:
    """Refuse a metric that nobody logs.

    Raises:
        ValueError: it is none of those that are known.
    """
    names = sorted(known)
    if monitor not in names:
        near = did_you_mean(monitor, names)
        raise ValueError(f"`monitor` is one of {names}, but got {monitor!r}.{near}")


def is_sparse_enough(trainer: L.Trainer) -> bool:
    """Whether the ramp of every pruning callback of a Trainer is over; True where there is none."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return all(callback.is_final for callback in callbacks if isinstance(callback, PruningCallback))


class SparseModelCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that saves once the final sparsity is reached, and not before.

    The best model of a run that is pruned in training is often an early one, which is hardly pruned. All arguments are
    those of Lightning's own; of what is saved before the ramp ends, another ModelCheckpoint can keep the last. Where a
    `CollapseGuard` holds weights that were to go, the end of the ramp counts. A metric that nobody logs is told after
    the first validation.

    Cost: that of a `ModelCheckpoint`.

    When: the best model of a run that is pruned in training is wanted, and not its last.

    Example:
        >>> from lightning_prune import SparseModelCheckpoint
        >>> SparseModelCheckpoint(monitor="val/loss").monitor
        'val/loss'
    """

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or not is_sparse_enough(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, or see already that there will be what to save by.

        Raises:
            ValueError: nobody logs the metric.
        """
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._look_ahead(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do the same, where checkpoints are saved after training epochs."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer) and trainer.fit_loop.epoch_loop.val_loop._has_run:
            self._look_ahead(trainer)

    def _look_ahead(self, trainer: L.Trainer) -> None:
        is_early = not is_sparse_enough(trainer) and not super()._should_skip_saving_checkpoint(trainer)
        if self.monitor is not None and is_early:
            check_is_logged(self.monitor, self._monitor_candidates(trainer))


class SparseEarlyStopping(EarlyStopping):
    """An `EarlyStopping` whose patience counts from the moment at which the final sparsity is reached.

    While sparsity rises a metric may well get worse; that is no reason to stop. All arguments are those of Lightning's
    own. Where a `CollapseGuard` holds weights that were to go, the end of the ramp counts.

    Cost: nothing: it looks at a metric that is logged.

    When: a run is to end once the sparse model has stopped getting better, and not while sparsity rises.

    Example:
        >>> from lightning_prune import SparseEarlyStopping
        >>> SparseEarlyStopping(monitor="val/loss", patience=2).patience
        2
    """

    def _should_skip_check(self, trainer: L.Trainer) -> bool:
        if super()._should_skip_check(trainer):
            return True
        if is_sparse_enough(trainer):
            return False
        self._validate_condition_metric(trainer.callback_metrics)  # a metric that nobody logs is told at once
        return True
