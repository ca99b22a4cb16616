"""A module's own steps, run beside training: on batches of calibration, to see its calls, and for their loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune.graph.sandbox import attributes_kept, buffers_copied, mode_of_training
from lightning_prune.model.calls import capture_call, random_states_kept, undisturbed
from lightning_prune.model.statistics import Statistics


def step_of(
    module: L.LightningModule, batches: Sequence[Any] = (), *, is_told: bool = False, name: str | None = None
) -> Any:
    """Return the module's own step as (module, batch) -> its result, which leaves no trace in the module.

    Modules in training mode alone keep what it writes into buffers: batch norms that are estimated anew.

    It is `training_step`, or with manual optimization, where that would train, `validation_step`; running it raises a
    ValueError where the module has none.

    Args:
        module: whose step it is.
        batches: those that will be given, whose places are their `batch_idx`; of others it is 0.
        is_told: whether the module is told that it trains, though dropout and batch norms stay as they are.
        name: of another step.
    """
    name = name or ("training_step" if module.automatic_optimization else "validation_step")
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
        still = [part for part in model.modules() if not part.training]
        told = _told_to_train(model, is_told)
        with attributes_kept(model), buffers_copied(still), told, _explained(model, name):
            return function(*args, **loader)

    return step


def run_steps(
    module: L.LightningModule, batches: Sequence[Any], statistics: Statistics, run: Callable[[bool], None]
) -> bool:
    """Do what runs a module's steps in eval mode, or again where they only run, or run all, if told that it trains.

    So it is with detectors that return losses while they train, and boxes else, and with heads for training alone.

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
    """Whether a step fails on the first batch, or runs less of the module, unless the module is told that it trains."""

    def ran(is_told: bool) -> set[nn.Module] | None:
        try:
            with undisturbed(module), silenced(module), torch.no_grad(), capture_call(module) as caught:
                step_of(module, batches, is_told=is_told)(module, batches[0])
        except Exception:
            return None
        return set(caught.call.ran or ()) if caught.call is not None else set()

    if not batches or (told := ran(True)) is None:
        return False
    return (untold := ran(False)) is None or not told <= untold


@contextmanager
def _told_to_train(model: nn.Module, is_told: bool) -> Iterator[None]:
    """Set the training flag of the modules that are not torch's own, whose dropout and batch norms go on as they do."""
    told = [module for module in model.modules() if is_told and not _is_torch(module)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with mode_of_training(told, True), random_states_kept(device) if told else nullcontext():
        yield


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
