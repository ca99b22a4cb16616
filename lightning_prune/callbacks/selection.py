"""The best checkpoint and the end of training, chosen among models that are as sparse as they are to be."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_prune.callbacks.base import PruningCallback


def is_sparse_enough(trainer: L.Trainer) -> bool:
    """Whether every pruning callback of a Trainer has reached its final sparsity; True where there is none."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return all(callback.is_final for callback in callbacks if isinstance(callback, PruningCallback))


class SparseModelCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that saves once the final sparsity is reached, and not before.

    The best model of a run that is pruned in training is often an early one, which is hardly pruned. All arguments are
    those of Lightning's own; of what is saved before the ramp ends, another ModelCheckpoint can keep the last.

    Cost: that of a `ModelCheckpoint`.

    When: the best model of a run that is pruned in training is wanted, and not its last.

    Example:
        >>> from lightning_prune import SparseModelCheckpoint
        >>> SparseModelCheckpoint(monitor="val/loss").monitor
        'val/loss'
    """

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or not is_sparse_enough(trainer)


class SparseEarlyStopping(EarlyStopping):
    """An `EarlyStopping` whose patience counts from the moment at which the final sparsity is reached.

    While sparsity rises a metric may well get worse; that is no reason to stop. All arguments are those of Lightning's
    own.

    Cost: nothing: it looks at a metric that is logged.

    When: a run is to end once the sparse model has stopped getting better, and not while sparsity rises.

    Example:
        >>> from lightning_prune import SparseEarlyStopping
        >>> SparseEarlyStopping(monitor="val/loss", patience=2).patience
        2
    """

    def _should_skip_check(self, trainer: L.Trainer) -> bool:
        return super()._should_skip_check(trainer) or not is_sparse_enough(trainer)
