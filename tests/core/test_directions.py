"""What is better of a metric, by its name: all metrics of torchmetrics whose own answer is known."""

from __future__ import annotations

import inspect

import pytest
import torchmetrics

from lightning_prune.core.directions import checked_mode, direction

NAMES = {
    "val/loss": "min",
    "val_loss_epoch": "min",
    "val/loss/dataloader_idx_0": "min",
    "val_mse": "min",
    "val/rmse_epoch/dataloader_idx_12": "min",
    "valLoss": "min",
    "valloss": "min",
    "test/nll": "min",
    "val.bits_per_dim_bpd": "min",
    "cross_entropy": "min",
    "val/acc": "max",
    "val_acc@1": "max",
    "acc1": "max",
    "val_top5": "max",
    "mAP": "max",
    "val/mAP50": "max",
    "mIoU": "max",
    "testacc": "max",
    "num_bytes": "min",
    "dense/latency_ms": "min",
    "elegance": None,
    "": None,
    "epoch": None,
    "sparsity": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_all_kinds(name):
    assert direction(name) == NAMES[name]


def test_it_is_never_wrong_of_the_metrics_of_torchmetrics():
    """Each says itself whether higher is better; names that do not tell are no mistakes, but few."""
    known = [
        (name, metric.higher_is_better)
        for name, metric in vars(torchmetrics).items()
        if inspect.isclass(metric) and isinstance(getattr(metric, "higher_is_better", None), bool)
    ]
    found = {name: direction(f"val/{name}") for name, _ in known}
    assert len(known) > 30
    wrong = [n for n, is_more in known if found[n] not in (None, "max" if is_more else "min")]
    assert wrong == []
    assert sum(mode is None for mode in found.values()) <= len(found) / 3


@pytest.mark.parametrize(("metric", "mode"), [("elegance", None), ("val/acc", "best"), ("val/acc", True)])
def test_what_nobody_knows_is_asked_for(metric, mode):
    with pytest.raises(ValueError, match="`mode` is"):
        checked_mode(metric, mode)
