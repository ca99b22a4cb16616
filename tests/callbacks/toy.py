"""Tiny modules, data and a trainer for tests of the callbacks."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.examples.loading import Pairs, ResumableLoader, as_sliced

NUM_BATCHES = 6


def data(shuffle: bool = False, num: int = 48) -> DataLoader:
    """48 examples in 6 batches; shuffled by epoch, and resumable in the middle of one."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(num, 8, generator=draw)
    pairs = Pairs(inputs, (inputs @ torch.randn(8, 4, generator=draw)).argmax(1))
    sampler = DistributedSampler(pairs, num_replicas=1, rank=0, shuffle=shuffle, seed=0)
    return ResumableLoader(pairs, batch_size=num // NUM_BATCHES, sampler=sampler, collate_fn=as_sliced)


class Toy(L.LightningModule):
    """A classifier with batch norm and dropout, so that buffers and random state matter as well."""

    def __init__(self, optimizer: str = "AdamW", **options: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.ReLU()
        )
        self.head = nn.Linear(8, 4)
        self.optimizer, self.options = optimizer, {"lr": 1e-2, **options}

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val/loss", F.cross_entropy(logits, batch[1]))
        self.log("val/acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)(self.parameters(), **self.options)


class GAN(L.LightningModule):
    """Two optimizers by hand: the discriminator reads what the generator makes right after that has stepped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        real, noise = batch[0], torch.randn(len(batch[0]), 4)
        fooled = -F.logsigmoid(self.discriminator(self.generator(noise))).mean()
        generator.zero_grad()
        self.manual_backward(fooled)
        generator.step()
        fake = self.generator(noise).detach()
        told = -F.logsigmoid(self.discriminator(real)).mean() - F.logsigmoid(-self.discriminator(fake)).mean()
        discriminator.zero_grad()
        self.manual_backward(told)
        discriminator.step()

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), 1e-2),
            torch.optim.Adam(self.discriminator.parameters(), 1e-2),
        ]


def trainer(*callbacks: L.Callback, **options) -> L.Trainer:
    settings = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **settings | options)


def pruned_weights(module: nn.Module, callback: PruningCallback) -> Iterator[torch.Tensor]:
    for name, parameter in module.named_parameters():
        if name in callback.masks:
            yield parameter.detach()[~callback.masks[name]]


class Witness(L.Callback):
    """Counts the forwards that read a weight which should be zero as something else."""

    def __init__(self, callback: PruningCallback) -> None:
        self.callback, self.reads, self.violations = callback, 0, 0

    def setup(self, trainer, pl_module, stage):
        for module in pl_module.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda *_: self.look(pl_module))

    def look(self, module):
        self.reads += bool(self.callback.masks)
        self.violations += any(bool(w.count_nonzero()) for w in pruned_weights(module, self.callback))
