"""The state of the random generators that a resumed run goes on from: dropout, shuffling, augmentation."""

from __future__ import annotations

import random
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lightning_prune.callbacks.states import restoring


class RandomState(L.Callback):
    """Let a resumed run draw the random numbers that it would have drawn: dropout goes on bit for bit.

    Lightning restores weights, optimizers and loops, but no generator. Pruning callbacks add this one.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._place: Tensor | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the state of every rank; Lightning calls this on all of them."""
        checkpoint["callbacks"][self.state_key] = collect(trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the state, from which the next epoch draws its order."""
        self._loaded = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.training and self._loaded is not None:
            with restoring(self):
                restore(trainer, self._loaded)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore it once more where a run goes on within an epoch: finding its place drew from it."""
        if self._loaded is not None and batch_idx > 0:
            restore(trainer, self._loaded)
        self._loaded = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Note where training is in its random numbers."""
        self._place = torch.get_rng_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go back to that place: a run that is resumed between the two has not drawn what validation draws."""
        if self._place is not None and not trainer.sanity_checking:
            torch.set_rng_state(self._place)


def collect(trainer: L.Trainer) -> dict[str, Any]:
    """Return the states of this process, and of torch's generators on every rank; to be called on all of them."""
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    generators = {"cpu": torch.get_rng_state()}
    if trainer.strategy.root_device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(trainer.strategy.root_device)
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": {device: _by_rank(trainer, state) for device, state in generators.items()},
    }


def restore(trainer: L.Trainer, state: dict[str, Any]) -> None:
    """Set the generators of this process to a state that `collect` returned.

    A rank that was not there then starts from the state that it has.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    for device, states in state["torch"].items():
        if trainer.global_rank >= len(states):
            continue
        if device == "cpu":
            torch.set_rng_state(states[trainer.global_rank].cpu().clone())
        elif trainer.strategy.root_device.type == device:
            torch.cuda.set_rng_state(states[trainer.global_rank].cpu().clone(), trainer.strategy.root_device)


def _by_rank(trainer: L.Trainer, state: Tensor) -> list[Tensor]:
    if trainer.world_size == 1:
        return [state]
    gathered = trainer.strategy.all_gather(state.to(trainer.strategy.root_device))
    return [own.cpu().clone() for own in gathered]  # torch's generators crash on views of a larger tensor
