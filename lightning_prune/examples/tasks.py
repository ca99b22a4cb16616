"""LightningModules: a classifier and a language model, each around a network of `examples.networks`.

They know nothing of pruning. Their settings are plain values, so a checkpoint holds them and `load_from_checkpoint`
needs nothing else, under `weights_only=True` too.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lightning_prune.core.checks import check_choice, check_positive, check_range
from lightning_prune.examples import networks

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
LR_SCHEDULES = ("constant_then_cosine", "cosine", "constant")
DECAY_START = 0.7
"""Where "constant_then_cosine" begins to decay, as a fraction of the run: where the default pruning window ends."""


def lr_factor(lr_schedule: str, progress: float) -> float:
    """Return what the learning rate is multiplied with.

    Args:
        lr_schedule: "constant"; "cosine", from the start to 0 at the end; or "constant_then_cosine", constant for the
            first 70 % of the run, in which sparsity rises by default, and a cosine to 0 after.
        progress: in [0, 1].

    Example:
        >>> [round(lr_factor("constant_then_cosine", p), 3) for p in (0.0, 0.7, 0.85, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """
    if lr_schedule == "constant":
        return 1.0
    start = DECAY_START if lr_schedule == "constant_then_cosine" else 0.0
    decayed = min(max(0.0, (progress - start) / (1.0 - start)), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * decayed))


class Task(L.LightningModule):
    """Base of the tasks: a network, its loss and how it is optimized.

    Args:
        network: name of a class in `lightning_prune.examples.networks`.
        optimizer: "adam", "adamw" or "sgd".
        lr: learning rate at the start, above 0.
        weight_decay: at least 0.
        momentum: of SGD, in [0, 1).
        lr_schedule: what becomes of the learning rate, see `lr_factor`.
        settings: of the network.

    Raises:
        ValueError: a value out of its range.
        TypeError: a setting that the network does not have.
    """

    def __init__(
        self,
        network: str,
        *,
        optimizer: str = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        lr_schedule: str = "constant_then_cosine",
        **settings: Any,
    ) -> None:
        super().__init__()
        known = [name for name, value in vars(networks).items() if _is_network(name, value)]
        self.network: nn.Module = getattr(networks, check_choice("network", network, known))(**settings)
        self.optimizer = check_choice("optimizer", optimizer, OPTIMIZERS)
        self.lr = check_positive("lr", lr)
        self.weight_decay = check_range("weight_decay", weight_decay, 0.0, math.inf, "a number of at least 0")
        self.momentum = check_range("momentum", momentum, 0.0, 1.0, "a number in [0, 1)", open_end=True)
        self.lr_schedule = check_choice("lr_schedule", lr_schedule, LR_SCHEDULES)
        self.save_hyperparameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            options["momentum"] = self.momentum
        optimizer = OPTIMIZERS[self.optimizer](self.parameters(), **options)
        if self.lr_schedule == "constant":
            return optimizer
        num_steps = self._num_steps()
        scheduler = LambdaLR(optimizer, lambda step: lr_factor(self.lr_schedule, step / num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _num_steps(self) -> float:
        num_steps = self.trainer.estimated_stepping_batches
        if not (math.isfinite(num_steps) and num_steps >= 1):
            raise ValueError(
                f"`lr_schedule` {self.lr_schedule!r} needs a run of known length, but got {num_steps} steps: set "
                "`max_epochs` or `max_steps` on the Trainer, or lr_schedule='constant'."
            )
        return num_steps


class Classifier(Task):
    """Cross-entropy over classes; logs `train/loss`, `val/loss`, `val/acc`, `test/loss`, `test/acc`.

    Args:
        network: name of a class in `lightning_prune.examples.networks`, with logits (B, `num_classes`).
        num_classes: at least 2.
        options: as in `Task`, and the settings of the network.

    Example:
        >>> Classifier("MLP", sizes=[64, 32, 10], lr=3e-3).hparams["sizes"]
        [64, 32, 10]
    """

    def __init__(self, network: str = "MLP", *, num_classes: int = 10, **options: Any) -> None:
        super().__init__(network, **options)
        self.save_hyperparameters()
        self.accuracy = nn.ModuleDict(
            {f"{stage}/acc": MulticlassAccuracy(num_classes, average="micro") for stage in ("val", "test")}
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, targets = batch
        logits, accuracy = self(inputs), _metric(self.accuracy, f"{stage}/acc")
        accuracy.update(logits, targets)
        self.log(f"{stage}/loss", F.cross_entropy(logits, targets))
        self.log(f"{stage}/acc", accuracy, prog_bar=True)


class LanguageModel(Task):
    """Cross-entropy of the next token; logs `train/loss`, `val/loss`, `val/perplexity`, `test/loss`, `test/perplexity`.

    Args:
        network: name of a class in `lightning_prune.examples.networks`, with logits (B, T, vocabulary).
        options: as in `Task`, and the settings of the network.

    Example:
        >>> LanguageModel("GPT", num_layers=1, width=32)(torch.zeros(1, 4).long()).shape
        torch.Size([1, 4, 65])
    """

    def __init__(self, network: str = "GPT", **options: Any) -> None:
        super().__init__(network, **options)
        self.save_hyperparameters()
        self.perplexity = nn.ModuleDict({f"{stage}/perplexity": Perplexity() for stage in ("val", "test")})

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, targets = batch
        logits, perplexity = self(inputs), _metric(self.perplexity, f"{stage}/perplexity")
        perplexity.update(logits, targets)
        self.log(f"{stage}/loss", F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        self.log(f"{stage}/perplexity", perplexity, prog_bar=True)


def _is_network(name: str, value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_")


def _metric(metrics: nn.ModuleDict, name: str) -> Metric:
    metric = metrics[name]
    assert isinstance(metric, Metric)
    return metric
