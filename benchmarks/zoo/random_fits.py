"""A trial within `Trainer.fit`: a random network becomes smaller as it trains; its checkpoints, and resumed runs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.zoo import random_recipes
from benchmarks.zoo.example import Example, tensors_in
from benchmarks.zoo.pieces import coin
from benchmarks.zoo.random_networks import random_network
from benchmarks.zoo.verdicts import CLEAR, WrongError, check, judged
from lightning_prune import (
    Budget,
    Channel,
    GeometricMedian,
    Layer,
    Magnitude,
    Taylor,
    TrainTimePruning,
    Window,
    load_pruned,
)
from lightning_prune import Random as RandomScores
from lightning_prune.graph import Plan
from lightning_prune.model.copies import copied
from lightning_prune.model.group_pruning import GroupPruner

EPOCHS, BATCHES = 2, 4
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3),
}


class Fitted(L.LightningModule):
    """A random network that learns to be silent.

    Args:
        seed: of the network.
        optimizer: one of `OPTIMIZERS`.
    """

    def __init__(self, seed: int, optimizer: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = random_network(seed).model

    def forward(self, *args: Tensor) -> Any:
        return self.network(*args)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack([t.float().pow(2).mean() for t in tensors_in(self.network(*batch))]).sum()

    def configure_optimizers(self) -> Optimizer:
        return OPTIMIZERS[self.hparams["optimizer"]](self.parameters())


def trial_in_a_fit(seed: int) -> dict[str, Any]:
    """Fit one network, compare it before and after each shrinking, load its checkpoint, and resume from the middle."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    draw = Random(seed + 10**9)
    settings, name = recipe(draw), draw.choice(list(OPTIMIZERS))
    module = Fitted(seed, name)
    args = random_network(seed).args
    row = {"pieces": len(module.network.steps), "recipe": f"in a fit, {settings}"}
    errors: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            with judging(args, errors):
                trainer = fitted(module, args, settings, Path(folder) / "whole")
        except ValueError as error:
            if not CLEAR.search(str(error)):
                raise WrongError(f"an error that does not say what is wrong: {error}") from error
            return row | {"outcome": "refused", "why": str(error)[:200]}
        if not errors:
            return row | {"outcome": "nothing removed"}
        trainer.save_checkpoint(Path(folder) / "small.ckpt")
        small = load_pruned(Fitted, Path(folder) / "small.ckpt")
        check(same(small, module), "a loaded checkpoint is another model")
        if coin(draw):
            again = Fitted(seed, name)
            fitted(again, args, settings, Path(folder) / "rest", Path(folder) / "whole" / "epoch=0.ckpt")
            check(same(again, module), "a resumed run ends as another model")
    return row | {"outcome": "equal", "error": max(errors)}


def recipe(draw: Random) -> dict[str, Any]:
    """Draw the arguments of the callback."""
    found: dict[str, Any] = {
        "granularity": random_recipes.granularity(draw),
        "scope": random_recipes.scope(draw),
        "criterion": draw.choice([Magnitude(2.0), RandomScores(3), GeometricMedian(), Taylor()]),
        "shrink": draw.choice(["update", "update", "end"]),
        "window": Window(end=draw.choice([0.5, 0.7, 1.0]), every=draw.choice([0.15, 0.3])),
    }
    if isinstance(found["granularity"], Layer):
        found["granularity"] = Channel(multiple_of=1)
    if coin(draw, 0.3):
        kind = draw.choice(["params", "macs", "num_bytes"])
        return found | {"budget": Budget(**{kind: draw.uniform(0.3, 0.9)}, tolerance=0.1)}
    return found | {"sparsity": draw.uniform(0.2, 0.9)}


def fitted(
    module: Fitted, args: tuple[Tensor, ...], settings: dict[str, Any], folder: Path, ckpt: Path | None = None
) -> L.Trainer:
    """Fit a module on batches around its example."""
    noise = torch.Generator().manual_seed(0)
    batches = [
        [x + 0.1 * torch.randn(x.shape, generator=noise) if x.is_floating_point() else x for x in args]
        for _ in range(BATCHES)
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[
            TrainTimePruning(**settings, report=False),
            ModelCheckpoint(folder, "{epoch}", save_top_k=-1),
        ],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt, weights_only=True)
    return trainer


@contextmanager
def judging(args: tuple[Tensor, ...], errors: list[float]) -> Iterator[None]:
    """Compare each smaller model with the reference, as it is cut out of the masked one in mid-training."""
    shrink_ = GroupPruner.shrink_

    def watched(
        self: GroupPruner, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()
    ) -> Plan:
        dense = copied(self.model).eval()
        plan = shrink_(self, optimizers, copies)
        if not plan.is_empty:
            small = copied(self.model).eval()
            errors.append(judged(Example(dense, args), Example(small, args), plan)["error"])
        return plan

    with mock.patch.object(GroupPruner, "shrink_", watched):
        yield


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
