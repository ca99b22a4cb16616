"""Only models at the final sparsity are chosen among, and patience counts from there."""

import pytest
import torch

from lightning_prune import (
    PostTrainingPruning,
    SparseEarlyStopping,
    SparseModelCheckpoint,
    SparseTraining,
    TrainTimePruning,
    WeightRewinding,
    Window,
)
from tests.callbacks.toy import Toy, data, trainer


class Worse(Toy):
    """A validation loss that rises from the first epoch on."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(float(self.trainer.current_epoch)))


def zeros_in(path, callback):
    saved = torch.load(path, weights_only=True)["state_dict"]
    return sum(int((saved[name] == 0).sum()) for name in callback.masks)


def test_the_best_checkpoint_is_a_sparse_one(tmp_path):
    pruning = TrainTimePruning(0.5, window=Window(end=0.6, every=0.1), report=False)
    best = SparseModelCheckpoint(tmp_path, monitor="val/loss", filename="{epoch}")
    trainer(pruning, best, max_epochs=5).fit(Worse(), data(), data())
    assert best.best_model_path.endswith(
        "epoch=2.ckpt"
    )  # the ramp ends after 3 of 5 epochs; 0 and 1 were better
    total = sum(mask.numel() for mask in pruning.masks.values())
    assert zeros_in(best.best_model_path, pruning) >= round(0.5 * total)


def test_patience_counts_from_the_end_of_the_ramp():
    pruning = TrainTimePruning(0.5, window=Window(end=0.5, every=0.1), report=False)
    stop = SparseEarlyStopping(monitor="val/loss", patience=2)
    fitted = trainer(pruning, stop, max_epochs=10)
    fitted.fit(Worse(), data(), data())
    assert fitted.current_epoch == 7  # 5 epochs of ramp, the first after it is the best, two worse ones


@pytest.mark.parametrize(
    ("pruning", "first"),
    [
        (SparseTraining(0.5, report=False), 0),  # sparse from the start
        (WeightRewinding(0.5, num_levels=1, report=False), 2),  # the second training of two epochs
        (PostTrainingPruning(0.5, report=False), 0),  # pruned after it all
        (None, 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_callbacks_say_when_they_are_done(pruning, first, tmp_path):
    best = SparseModelCheckpoint(tmp_path, monitor="val/loss", filename="{epoch}")
    trainer(*([pruning] if pruning else []), best, max_epochs=2).fit(Worse(), data(), data())
    assert best.best_model_path.endswith(f"epoch={first}.ckpt")


@pytest.mark.parametrize("kind", [SparseEarlyStopping, SparseModelCheckpoint])
def test_a_metric_that_nobody_logs_is_told_before_the_ramp_is_over(kind, tmp_path):
    pruning = TrainTimePruning(0.5, window=Window(end=0.9, every=0.1), report=False)
    folder = {"dirpath": tmp_path} if kind is SparseModelCheckpoint else {}
    run = trainer(pruning, kind(monitor="val/los", **folder), max_epochs=10)
    with pytest.raises((ValueError, RuntimeError), match="val/loss"):
        run.fit(Worse(), data(), data())
    assert run.current_epoch == 0
