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

from lightning_prune.core.checks import check_choice
from lightning_prune.examples import networks
from lightning_prune.examples.settings import Optimization

CLASSES: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class Task(L.LightningModule):
    """Base of the tasks: a network, its loss and how it is optimized.

    Args:
        network: name of a class in `lightning_prune.examples.networks`.
        optimizer: as in `settings.Optimization`, like the four that follow.
        lr: learning rate at the start, above 0.
        weight_decay: at least 0.
        momentum: of SGD, in [0, 1).
        lr_schedule: what becomes of the learning rate.
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
        self.optimization = Optimization(optimizer, lr, weight_decay, momentum, lr_schedule)
        self.save_hyperparameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        chosen = self.optimization
        options: dict[str, Any] = {"lr": chosen.lr, "weight_decay": chosen.weight_decay}
        if chosen.optimizer == "sgd":
            options["momentum"] = chosen.momentum
        optimizer = CLASSES[chosen.optimizer](self.parameters(), **options)
        if chosen.lr_schedule == "constant":
            return optimizer
        num_steps = self._num_steps()
        scheduler = LambdaLR(optimizer, lambda step: chosen.lr_factor(step / num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _num_steps(self) -> float:
        num_steps = self.trainer.estimated_stepping_batches
        if not (math.isfinite(num_steps) and num_steps >= 1):
            raise ValueError(
                f"`lr_schedule` {self.optimization.lr_schedule!r} needs a run of known length, but got {num_steps}: "
                "set `max_epochs` or `max_steps` on the Trainer, or lr_schedule='constant'."
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
