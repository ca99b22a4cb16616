"""The weights of a run's best checkpoint, where these are to be pruned and not the last ones."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.model.whole import read_checkpoint


def check_has_best(trainer: L.Trainer) -> None:
    """Refuse a trainer that will not know which checkpoint was the best.

    Raises:
        ValueError: no callback saves checkpoints by a metric.
    """
    callback = trainer.checkpoint_callback
    if not (isinstance(callback, ModelCheckpoint) and callback.monitor):
        raise ValueError(
            '`checkpoint` is "best" only with a ModelCheckpoint(monitor=...), but the Trainer has none.'
        )


def load_best_(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Load the best weights of a run that is over.

    Raises:
        ValueError: nothing was saved.
    """
    callback = trainer.checkpoint_callback
    assert isinstance(callback, ModelCheckpoint)
    if not callback.best_model_path:
        raise ValueError('`checkpoint` is "best", but no checkpoint was saved: there was no validation.')
    state = read_checkpoint(callback.best_model_path, module.device)["state_dict"]
    module.load_state_dict(state, strict=module.strict_loading)
