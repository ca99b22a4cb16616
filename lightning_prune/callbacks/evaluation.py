"""Running a module's own steps outside of a loop: calibration batches, and validation in the middle of a hook."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import IterableDataset
from torchmetrics import Metric

from lightning_prune.graph.sandbox import attributes_kept
from lightning_prune.model.calls import random_states_kept, undisturbed
from lightning_prune.model.statistics import Statistics

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

    They come from copies of the loaders, whose place within the epoch stays as it is; that of a generator within an
    iterable data set, of which there is no copy, does not.
    """
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    again = CombinedLoader(tree_map(_aside, loader.iterables), loader._mode)
    return _on_device(trainer, (batch for batch, _, _ in islice(iter(again), num_batches)))


def examples(trainer: L.Trainer, batch: Any) -> Iterator[Any]:
    """Yield the batch of a hook while fitting, and others only where they are wanted.

    Steps that read from a `dataloader_iter` may have none in the hook.
    """
    if batch is not None:
        yield batch
    with random_states_kept(trainer.lightning_module.device):
        more = training_batches(trainer, NUM_EXAMPLES)
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


def step_of(module: L.LightningModule, batches: Sequence[Any] = (), *, is_told: bool = False) -> Any:
    """Return the module's own step as (module, batch) -> its result, which leaves no trace in the module's attributes.

    It is `training_step`, or with manual optimization, where that would train, `validation_step`; running it raises a
    ValueError where the module has none.

    Args:
        module: whose step it is.
        batches: those that will be given, whose places are their `batch_idx`; of others it is 0.
        is_told: whether the module is told that it trains, though dropout and batch norms stay as they are.
    """
    name = "training_step" if module.automatic_optimization else "validation_step"
    places = {id(batch): place for place, batch in enumerate(batches)}

    def step(model: nn.Module, batch: Any) -> Any:
        if not is_overridden(name, module):
            raise ValueError(
                f"`{name}` runs {type(module).__name__} on a batch outside of training, with automatic_optimization="
                f"{module.automatic_optimization}, but there is none: write one."
            )
        function, place = getattr(model, name), places.get(id(batch), 0)
        names = inspect.signature(function).parameters
        args: tuple[Any, ...] = (batch, place)[: len(names)]
        if "dataloader_iter" in names:
            args = (iter([(batch, place, 0)]),)
        loader = {"dataloader_idx": 0} if "dataloader_idx" in names else {}
        with attributes_kept(model), _told_to_train(model, is_told), _explained(model, name):
            return function(*args, **loader)

    return step


def run_steps(
    module: L.LightningModule, batches: Sequence[Any], statistics: Statistics, run: Callable[[bool], None]
) -> bool:
    """Do what runs a module's steps in eval mode, or again where they only run if it is told that it trains.

    So it is with detectors that return losses while they train, and boxes else.

    Args:
        module: whose steps they are.
        batches: those that they are given.
        statistics: that are read meanwhile, and begun anew the second time.
        run: takes whether the module is to be told that it trains; its first batch comes before all that it changes.

    Returns:
        Whether it had to be told.
    """
    try:
        run(False)
    except Exception:
        if not _must_be_told(module, batches):
            raise
        statistics.clear()
        run(True)
        return True
    return False


def _must_be_told(module: L.LightningModule, batches: Sequence[Any]) -> bool:
    """Whether a step fails on the first batch in eval mode, and not where the module is told that it trains."""

    def is_failing(is_told: bool) -> bool:
        try:
            with undisturbed(module), silenced(module), torch.no_grad():
                step_of(module, batches, is_told=is_told)(module, batches[0])
        except Exception:
            return True
        return False

    return bool(batches) and is_failing(False) and not is_failing(True)


@contextmanager
def _told_to_train(model: nn.Module, is_told: bool) -> Iterator[None]:
    """Set the training flag of the modules that are not torch's own, whose dropout and batch norms go on as they do."""
    told = [module for module in model.modules() if is_told and not _is_torch(module)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    random = random_states_kept(device) if told else nullcontext()
    flags = [(module, module.training) for module in told]
    for module in told:
        module.training = True
    try:
        with random:
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _is_torch(module: nn.Module) -> bool:
    known = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase
    return type(module).__module__.startswith("torch.") or isinstance(module, known)


@contextmanager
def _explained(model: nn.Module, name: str) -> Iterator[None]:
    """Say of an error in a step that it may be one of eval mode alone."""
    try:
        yield
    except Exception as error:
        if not model.training:
            error.add_note(f"`{name}` was run beside training, with {type(model).__name__} in eval mode.")
        raise


def loss_of(module: L.LightningModule, batches: Sequence[Any] = (), *, is_told: bool = False) -> Any:
    """Return (module, batch) -> the loss of `training_step`, or None for a batch that it skips.

    Args:
        module: whose loss it is.
        batches: as for `step_of`.
        is_told: the same.

    Raises:
        ValueError: manual optimization, whose training step returns no loss and steps the optimizers itself.
    """
    if not module.automatic_optimization:
        raise ValueError(
            "`criterion` asks for gradients, which need automatic optimization to calibrate: train with it."
        )

    step = step_of(module, batches, is_told=is_told)

    def loss(model: nn.Module, batch: Any) -> Tensor | None:
        result = step(model, batch)
        found: Tensor | None = result["loss"] if isinstance(result, dict) else result
        return found

    return loss


@contextmanager
def silenced(module: L.LightningModule) -> Iterator[None]:
    """Let a module's steps run without logging anything or leaving a trace in its metrics."""
    before = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    module.__dict__["log"] = module.__dict__["log_dict"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value
        for metric in (m for m in module.modules() if isinstance(m, Metric)):
            metric.reset()
