"""What the pictures share: their style, and small networks that are trained on the embedded digits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_prune.examples.data import Digits
from lightning_prune.examples.tasks import Classifier

TEAL, ORANGE, SLATE, GOLD, PLUM, SKY = "#14746f", "#e07a2f", "#5b6770", "#d9a404", "#7b4b94", "#3d8fd1"
COLOURS = (TEAL, ORANGE, SKY, PLUM, GOLD, SLATE)
STYLE = {
    "axes.edgecolor": "#9aa5ab",
    "axes.grid": True,
    "axes.labelcolor": "#2f3a40",
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.dpi": 110,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "lightning_prune",
    "xtick.color": "#5b6770",
    "ytick.color": "#5b6770",
}
KEPT = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#9fd3c7", TEAL, "#06302d"])


def new_figure(width: float = 7.2, height: float = 3.0) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def fit(callbacks: Sequence[L.Callback] = (), epochs: int = 10, seed: int = 0, **options: Any) -> Classifier:
    """Train a network on the embedded digits."""
    L.seed_everything(seed, verbose=False)
    task = Classifier(**{"network": "ConvNet", "lr": 5e-3, **options})
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, Digits())
    return task


@cache
def trained(network: str = "ConvNet") -> nn.Module:
    options = {"sizes": (64, 128, 64, 10)} if network == "MLP" else {}
    return fit(network=network, **options).network.eval()


def fresh(network: str = "ConvNet") -> nn.Module:
    return copy.deepcopy(trained(network))


@cache
def digits(part: str = "test") -> tuple[Tensor, Tensor]:
    data = Digits(batch_size=512)
    data.setup("fit")
    loader = data.test_dataloader() if part == "test" else data.train_dataloader()
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def accuracy(network: nn.Module) -> float:
    x, y = digits()
    with torch.no_grad():
        return float((network.eval()(x).argmax(1) == y).float().mean())
