"""Calibration batches: statistics for criteria, and batch-norm statistics after pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.model.gradients import Gradients
from lightning_prune.model.passes import Step, passes_of
from lightning_prune.model.ranks import is_distributed
from lightning_prune.model.statistics import Statistics
from lightning_prune.model.unfinished import Unfinished
from lightning_prune.report.progress import steps

Loss = Callable[[nn.Module, Any], Tensor]
CALIBRATION = "calibration"


def calibrate(
    statistics: Statistics,
    model: nn.Module,
    batches: Iterable[Any] | None,
    *,
    forward: Step | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batch_statistics: bool = False,
    unfinished: Unfinished | None = None,
) -> None:
    """Run calibration batches through a model in eval mode, as far as its criterion needs them.

    Gradients are means over the batches, those of all processes where there are several; gradients that the parameters
    had before are put back. Frozen targets have gradients as others have, while it lasts.

    Args:
        statistics: what to read.
        model: the whole model.
        batches: anything that `forward` and `loss` understand.
        forward: (model, batch) -> anything; by default a mapping is passed as keyword arguments, of a tuple or list
            the first entry, anything else as it is.
        loss: (model, batch) -> scalar.
        batch_statistics: whether batch norms normalise by each batch, as in training; their running statistics, of
            which there are none yet in a model at initialisation, are neither read nor changed.
        unfinished: holds the sums over the batches of before, and those so far when it is interrupted.

    Raises:
        ValueError: what the criterion needs is not given, or belongs to training.
    """
    if not (statistics.activations or statistics.gradients):
        return
    _check(statistics, batches, loss)
    assert batches is not None
    mean = Gradients(statistics.targets, ("grad",))
    passes = passes_of(statistics, model, forward or call_model, loss, mean)
    found = _Sums(list(batches) if len(passes) > 1 else batches, statistics, mean, unfinished)
    whole = unfinished.whole_steps() if unfinished is not None else nullcontext()
    normalising = _by_batch_statistics(model) if batch_statistics else nullcontext()
    needing = statistics.targets.values() if statistics.needs_loss else ()
    with whole, evaluating(model), normalising, _own_gradients(model.parameters()), unfrozen(needing):
        for run in passes[found.num_passes :]:
            run(found)
            found.end_pass()
        found.end()
    statistics.from_gradients.sum_over_processes_()


class _Sums:
    """The batches of a pass, and how far the sums over them are: passes that are over, batches of the present one."""

    def __init__(
        self, batches: Iterable[Any], statistics: Statistics, mean: Gradients, unfinished: Unfinished | None
    ) -> None:
        self.batches, self.statistics, self.mean, self.unfinished = batches, statistics, mean, unfinished
        self.num_passes, self.num_batches, self.is_seen = 0, 0, False
        if unfinished is not None and unfinished.has(CALIBRATION):
            found = unfinished.read(CALIBRATION)
            self.num_passes, self.num_batches = found["num_passes"], found["num_batches"]
            statistics.load_sums(found["sums"])
            mean.load_state_dict(found["mean"])

    def __iter__(self) -> Iterator[Any]:
        rest = islice(self.batches, self.num_batches, None) if self.num_batches else self.batches
        for batch in steps(rest, "calibration"):
            self.is_seen = True
            yield batch
            self.num_batches += 1
            self._reached()

    def end_pass(self) -> None:
        """Go on to the next pass.

        Raises:
            ValueError: there was no batch.
        """
        if not (self.is_seen or self.num_batches):
            raise ValueError("`batches` is calibration data, at least one batch, but got none.")
        self.num_passes, self.num_batches = self.num_passes + 1, 0
        self._reached()

    def end(self) -> None:
        """Have the sums ready as they are at the end, whatever becomes of them."""
        if self.unfinished is not None:
            self.unfinished.hold(CALIBRATION, self._state().copy)

    def _reached(self) -> None:
        if self.unfinished is not None:
            self.unfinished.hold(CALIBRATION, self._state)
            self.unfinished.reached()

    def _state(self) -> dict[str, Any]:
        done = {"num_passes": self.num_passes, "num_batches": self.num_batches}
        return {**done, "sums": self.statistics.sums(), "mean": self.mean.state_dict()}


def reestimate_batch_norm_(model: nn.Module, batches: Iterable[Any], *, forward: Step | None = None) -> int:
    """Compute the running mean and variance of every batch norm anew, as plain averages over the batches.

    Pruning moves the distribution that they were estimated on; Li et al. 2020 (arXiv:2007.02491) adapt them so.

    Cost: one forward pass for each batch.

    When: networks with batch norms that are pruned in one shot and not trained on.

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
        for batch in steps(batches, "batch norm"):
            (forward or call_model)(model, batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(norms)


def gradients_by_batch(
    model: nn.Module, parameter: nn.Parameter, batches: Sequence[Any], loss: Loss
) -> Tensor:
    """Return the gradients of the loss in one parameter, (N, ...): one for each batch, those of all processes.

    Args:
        model: runs in eval mode.
        parameter: one of its own, which may be frozen.
        batches: as for `calibrate`, as many on each process.
        loss: (model, batch) -> scalar.

    Raises:
        ValueError: no gradient reaches the parameter.
    """
    found = []
    with evaluating(model), unfrozen([parameter]), torch.enable_grad():
        for batch in batches:
            if (value := loss(model, batch)) is None:  # a step that skips a batch
                found.append(torch.zeros_like(parameter, dtype=torch.float32))
                continue
            (gradient,) = torch.autograd.grad(value, [parameter], allow_unused=True)
            if gradient is None:
                shape = tuple(parameter.shape)
                raise ValueError(
                    f"`loss` depends on all pruned weights, but not on one of shape {shape}: exclude it."
                )
            found.append(gradient.float())
    own = torch.stack(found)
    if not is_distributed():
        return own
    everywhere = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everywhere, own.contiguous())
    return torch.cat(everywhere)


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
def unfrozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters have gradients, and freeze them again."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


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
