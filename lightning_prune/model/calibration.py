"""Calibration batches: statistics for criteria, and batch-norm statistics after pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.model.curvature import hessian_product, signs
from lightning_prune.model.flow import flow_gradients
from lightning_prune.model.gradients import FLOW, Gradients, is_distributed
from lightning_prune.model.statistics import Statistics

Step = Callable[[nn.Module, Any], Any]


def calibrate(
    statistics: Statistics,
    model: nn.Module,
    batches: Iterable[Any] | None,
    *,
    forward: Step | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batch_statistics: bool = False,
) -> None:
    """Run calibration batches through a model in eval mode, as far as its criterion needs them.

    Gradients are means over the batches, those of all processes where there are several; gradients that the parameters
    had before are put back.

    Args:
        statistics: what to read.
        model: the whole model.
        batches: anything that `forward` and `loss` understand.
        forward: (model, batch) -> anything; by default a mapping is passed as keyword arguments, of a tuple or list
            the first entry, anything else as it is.
        loss: (model, batch) -> scalar.
        batch_statistics: whether batch norms normalise by each batch, as in training; their running statistics, of
            which there are none yet in a model at initialisation, are neither read nor changed.

    Raises:
        ValueError: what the criterion needs is not given, or belongs to training.
    """
    if not (statistics.activations or statistics.gradients):
        return
    _check(statistics, batches, loss)
    assert batches is not None
    passes = _passes(statistics, model, forward or call_model, loss)
    found = _Counted(list(batches) if len(passes) > 1 else batches)
    normalising = _by_batch_statistics(model) if batch_statistics else nullcontext()
    with evaluating(model), normalising, _own_gradients(model.parameters()):
        for run in passes:
            run(found)
            if not found.num_batches:
                raise ValueError("`batches` is calibration data, at least one batch, but got none.")
    statistics.from_gradients.sum_over_processes_()


class _Counted:
    """Batches, and how many were read."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.num_batches = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.num_batches += 1
            yield batch


def _passes(
    statistics: Statistics, model: nn.Module, forward: Step, loss: Step | None
) -> list[Callable[[Iterable[Any]], None]]:
    """Return what has to be run on the batches, one after the other."""
    kinds, found = set(statistics.gradients), statistics.from_gradients
    mean = Gradients(statistics.targets, ("grad",))
    passes: list[Callable[[Iterable[Any]], None]] = []
    if loss is not None and kinds & {"grad", "grad_square", "hessian_gradient"}:
        ledgers = [found, mean] if "hessian_gradient" in kinds else [found]
        passes.append(partial(_run_backward, statistics, model, loss, ledgers))
    elif statistics.activations:
        passes.append(partial(_run_forward, statistics, model, forward))
    if loss is not None and "hessian_diagonal" in kinds:
        passes.append(partial(_run_probes, found, model, loss))
    if loss is not None and "hessian_gradient" in kinds:
        passes.append(partial(_run_products, found, model, loss, mean))
    if FLOW in kinds:
        passes.append(partial(_run_flow, found, model, forward))
    return passes


def _run_forward(statistics: Statistics, model: nn.Module, forward: Step, batches: Iterable[Any]) -> None:
    with statistics.watch(), torch.no_grad():
        for batch in batches:
            forward(model, batch)


def _run_backward(
    statistics: Statistics, model: nn.Module, loss: Step, ledgers: list[Gradients], batches: Iterable[Any]
) -> None:
    with statistics.watch(), torch.enable_grad():
        for batch in batches:
            loss(model, batch).backward()
            for ledger in ledgers:
                ledger.note()
                ledger.confirm()
            model.zero_grad(set_to_none=True)


def _run_probes(found: Gradients, model: nn.Module, loss: Step, batches: Iterable[Any]) -> None:
    """Hutchinson: z * H z for a random vector of signs, one for each batch of each process."""
    rank = torch.distributed.get_rank() if is_distributed() else 0
    for index, batch in enumerate(batches):
        probe = signs(found.targets, seed=index + (rank << 32))
        product = hessian_product(partial(loss, model, batch), found.targets, probe)
        for name, value in product.items():
            found.add_("hessian_diagonal", name, value * probe[name])


def _run_products(
    found: Gradients, model: nn.Module, loss: Step, mean: Gradients, batches: Iterable[Any]
) -> None:
    """H g, where both are means over all batches of all processes."""
    mean.sum_over_processes_()
    vectors = {name: mean.read("grad", name) for name in mean.totals["grad"]}
    for batch in batches:
        product = hessian_product(partial(loss, model, batch), found.targets, vectors)
        for name, value in product.items():
            found.add_("hessian_gradient", name, value)


def _run_flow(found: Gradients, model: nn.Module, forward: Step, batches: Iterable[Any]) -> None:
    for batch in islice(batches, 1):
        for name, value in flow_gradients(model, found.targets, partial(forward, model, batch)).items():
            found.add_(FLOW, name, value)


def reestimate_batch_norm_(model: nn.Module, batches: Iterable[Any], *, forward: Step | None = None) -> int:
    """Compute the running mean and variance of every batch norm anew, as plain averages over the batches.

    Pruning moves the distribution that they were estimated on; Li et al. 2020 (arXiv:2007.02491) adapt them so.

    Args:
        model: only its batch norms are changed; the other modules run in eval mode.
        batches: as for `calibrate`.
        forward: as for `calibrate`.

    Returns:
        How many batch norms there are; with none, no batch is run.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return 0
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.training = True
        for batch in batches:
            (forward or call_model)(model, batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(norms)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: on a mapping's keyword arguments, the first entry of a tuple or list, or the batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode, and each back to its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _by_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms normalise by each batch, and put their running statistics back."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextmanager
def _own_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Start without gradients, and put back those that were there."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def _check(statistics: Statistics, batches: Iterable[Any] | None, loss: object) -> None:
    if "movement" in statistics.gradients:
        raise ValueError(
            "`criterion` asks for `movement`, a sum over training: use it with TrainTimePruning."
        )
    if batches is None:
        raise ValueError(
            f"`batches` is calibration data, which the criterion needs for {list(statistics.names)}, but got None."
        )
    if statistics.needs_loss and loss is None:
        raise ValueError(
            "`loss` is a function (model, batch) -> scalar, which the criterion needs, but got None."
        )
