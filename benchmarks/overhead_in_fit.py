"""What it costs within `Trainer.fit` to keep a network 90 % sparse: `python -m benchmarks.overhead_in_fit`.

Each way fits the same network on the same batch for two epochs: it is pruned in the first or at its end, and the steps
of the second are timed, from batch to batch, on one thread in CPU time. The ways take turns; a ratio compares a fit
with that of plain training in the same round.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.overhead import NETWORKS, OPTIMIZERS, SPARSITY, run_all
from benchmarks.record import quartiles
from lightning_prune import InitialPruning, Magnitude, TrainTimePruning, Window

NUM_BATCHES = {"lenet": 60, "mlp": 12, "resnet": 3}


def by_model_pruning(module: L.LightningModule) -> list[L.Callback]:
    layers = [(m, "weight") for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [
        ModelPruning(
            "l1_unstructured",
            parameters_to_prune=layers,
            amount=SPARSITY,
            apply_pruning=lambda epoch: epoch == 0,
            use_global_unstructured=True,
            use_lottery_ticket_hypothesis=False,
        )
    ]


def train_time(module: L.LightningModule, **options: Any) -> list[L.Callback]:
    return [TrainTimePruning(SPARSITY, window=Window(end=0.4, every=0.1), report=False, **options)]


WAYS: dict[str, Callable[[L.LightningModule], list[L.Callback]]] = {
    "plain": lambda module: [],
    "TrainTimePruning": train_time,
    "TrainTimePruning(compact=False)": lambda module: train_time(module, compact=False),
    "InitialPruning": lambda module: [InitialPruning(SPARSITY, criterion=Magnitude(), report=False)],
    "Lightning's ModelPruning": by_model_pruning,
}


class Module(L.LightningModule):
    """A network with an optimizer by name."""

    def __init__(self, network: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self)


class Clock(L.Callback):
    """CPU seconds from one batch's start to the next one's, within the second epoch."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            self.starts.append(time.process_time())

    @property
    def seconds(self) -> float:
        return median(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))


def trained(
    network: str,
    way: Callable[[L.LightningModule], list[L.Callback]],
    optimizer: str,
    seed: int,
    watch: L.Callback,
) -> Module:
    """Return a network that was trained for two epochs on one batch, while something watches."""
    make_model, shape, _ = NETWORKS[network]
    torch.manual_seed(seed)
    module = Module(make_model(), optimizer)
    batch = torch.randn(shape), torch.randint(10, shape[:1])
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[*way(module), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * NUM_BATCHES[network], batch_size=None))
    return module


def fit(network: str, way: str, optimizer: str, seed: int) -> float:
    """Return the median CPU seconds of a step of a pruned network."""
    module = trained(network, WAYS[way], optimizer, seed, clock := Clock())
    layers = [m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    zeros = sum(int((w == 0).sum()) for w in layers) / sum(w.numel() for w in layers)
    assert way == "plain" or abs(zeros - SPARSITY) < 0.01, (way, zeros)
    return clock.seconds


def measure(args: argparse.Namespace, network: str, optimizer: str) -> dict[str, Any]:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in list(WAYS) if number % 2 else list(reversed(WAYS)):
            times[way].append(fit(network, way, optimizer, args.seed))
    rows = {
        way: {
            "seconds": quartiles(found),
            "ratio": quartiles([a / b for a, b in zip(found, times["plain"], strict=True)]),
        }
        for way, found in times.items()
    }
    return {"network": network, "optimizer": optimizer, "rounds": args.rounds, "ways": rows}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    run_all("overhead_in_fit", __doc__, measure, optimizers=["sgd", "adamw"], num_rounds=9)
