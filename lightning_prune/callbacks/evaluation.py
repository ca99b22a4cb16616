"""The data of a run, outside of its loops: batches to calibrate on, and validation in the middle of a hook."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import IterableDataset

from lightning_prune.model.calls import random_states_kept

NUM_EXAMPLES = 8
"""Batches among which one is looked for that a step does not skip."""


def validate_within_fit(trainer: L.Trainer) -> dict[str, float]:
    """Run the validation loop once more inside of `fit`, and return what it logs; empty without validation data.

    Callbacks that choose checkpoints or stop the run do not see it.
    """
    if not trainer.enable_validation:
        return {}
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    others = [cb for cb in callbacks if not isinstance(cb, (Checkpoint, EarlyStopping))]
    trainer.callbacks = others  # type: ignore[attr-defined]
    trainer.validating = True
    try:
        return as_metrics(trainer.fit_loop.epoch_loop.val_loop.run())
    finally:
        trainer.training = True
        trainer.callbacks = callbacks  # type: ignore[attr-defined]


def as_metrics(outputs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the scalars that an evaluation loop logged, over all its dataloaders."""
    return {
        k: float(v)
        for output in outputs
        for k, v in output.items()
        if not isinstance(v, Tensor) or v.numel() == 1
    }


def calibration_batches(trainer: L.Trainer, loader: Iterable[Any] | None, num_batches: int) -> list[Any]:
    """Return the first batches of a loader, or of several, on the trainer's device.

    They are those of the first epoch, whichever epoch a run has come to: one that is resumed where it ended reads the
    same. Their place within an epoch, which loaders go on from after a resume, is left out.

    Raises:
        ValueError: there is no loader, or it gives no batch.
    """
    if loader is None:
        raise ValueError(
            "`datamodule` gives training batches to calibrate on, but there is no train_dataloader."
        )
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    again = CombinedLoader(tree_map(_from_the_start, combined.iterables), combined._mode)
    with _first_epoch(tree_leaves(combined.iterables)):
        found = _on_device(trainer, (batch for batch, _, _ in islice(iter(again), num_batches)))
    if not found:
        raise ValueError("`train_dataloader` gives batches to calibrate on, but gave none.")
    return found


def _from_the_start(loader: Any) -> Any:
    """Return a copy of a loader that does not go on from a place within an epoch."""
    fresh = _aside(loader)
    if getattr(fresh, "_resumed", None) is not None:
        fresh._resumed = None
    return fresh


def _aside(loader: Any) -> Any:
    """Return a copy of a loader, whose place is its own, that of an iterable data set too."""
    fresh = copy.copy(loader)
    if isinstance(getattr(fresh, "dataset", None), IterableDataset):
        vars(fresh)["dataset"] = copy.copy(fresh.dataset)  # a loader refuses to have it set
    if getattr(fresh, "_iterator", None) is not None:
        fresh._iterator = None  # that of persistent workers, which training reads from
    return fresh


@contextmanager
def _first_epoch(loaders: Iterable[Any]) -> Iterator[None]:
    """Let samplers give the order of the first epoch for a while."""
    found: list[Any] = [getattr(ld, name, None) for ld in loaders for name in ("sampler", "batch_sampler")]
    samplers = [(sampler, sampler.epoch) for sampler in found if hasattr(sampler, "set_epoch")]
    for sampler, _ in samplers:
        sampler.set_epoch(0)
    try:
        yield
    finally:
        for sampler, epoch in samplers:
            sampler.set_epoch(epoch)


def training_batches(trainer: L.Trainer, num_batches: int) -> list[Any]:
    """Return the first training batches while fitting, as the steps are given them.

    They come from copies of the loaders, whose place within the epoch stays as it is, and the states of their random
    generators; the place of an iterator within an iterable data set, of which there is no copy, does not.
    """
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    again = CombinedLoader(tree_map(_aside, loader.iterables), loader._mode)
    with _generators_kept(tree_leaves(loader.iterables)):
        return _on_device(trainer, (batch for batch, _, _ in islice(iter(again), num_batches)))


def reads_once(trainer: L.Trainer) -> bool:
    """Whether to read training batches ahead may take them from training: those of iterable data sets."""
    loader = trainer.fit_loop._combined_loader
    loaders = tree_leaves(loader.iterables) if loader is not None else []
    return any(isinstance(getattr(each, "dataset", None), IterableDataset) for each in loaders)


@contextmanager
def _generators_kept(loaders: Iterable[Any]) -> Iterator[None]:
    """Put back the states of generators that loaders and their samplers share with copies."""
    owners = [
        o for ld in loaders for o in (ld, *(getattr(ld, n, None) for n in ("sampler", "batch_sampler")))
    ]
    owners += [getattr(owner, "sampler", None) for owner in owners]
    found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def examples(trainer: L.Trainer, batch: Any) -> Iterator[Any]:
    """Return the batch of a hook while fitting, and others only where they are wanted.

    Steps that read from a `dataloader_iter` may have none in the hook.
    """
    device = trainer.lightning_module.device
    return with_more(batch, device, lambda: training_batches(trainer, NUM_EXAMPLES))


def with_more(batch: Any, device: torch.device, read: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Yield a batch, if there is one, and those that are read only where they are wanted; random states stay."""
    if batch is not None:
        yield batch
    with random_states_kept(device):
        more = list(read())
    yield from more


def _on_device(trainer: L.Trainer, batches: Iterable[Any]) -> list[Any]:
    """Return batches as the module's steps are given them: in the trainer's precision, on its device."""

    def moved(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return [moved(batch) for batch in batches]


def builds_late(module: L.LightningModule) -> bool:
    """Whether a module's own hooks, which the trainer calls, may build its network."""
    return any(is_overridden(hook, module) for hook in ("configure_model", "setup"))
