"""Example calls of what is exported: with a batch of any size, and compared with what came of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.checks import check_positive
from lightning_prune.model.calls import Call, call_of, map_tensors, replaying, tensors_of
from lightning_prune.model.equivalence import largest_difference
from lightning_prune.model.export.files import staged
from lightning_prune.model.latency import measure_latencies
from lightning_prune.report.exports import Exported


@dataclass(frozen=True)
class Checks:
    """How an exported model is compared with the one that it was made of.

    Args:
        tolerance: largest difference of the outputs, relative to the largest one, above 0.
        dynamic_batch: whether the batch size may change; it is compared with another one too.
        latency: whether both are measured, in turns.
    """

    tolerance: float = 1e-4
    dynamic_batch: bool = True
    latency: bool = True

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance)


@contextmanager
def exporting(model: nn.Module, example: Any, checks: Checks) -> Iterator[tuple[Call, Any]]:
    """Give a call to export a model by, in eval mode and without gradients, and which of its dims are dynamic.

    Raises:
        ValueError: the example has no batch.
    """
    call = call_of(model, example)
    if checks.dynamic_batch and call.batch_size is None:
        raise ValueError(
            "`example` has a tensor with a batch in its first dim, but got none: dynamic_batch=False."
        )
    with replaying(model, call) as replayed:
        if not checks.dynamic_batch:
            yield replayed, None
            return
        traced = (
            replayed if replayed.batch_size != 1 else doubled(replayed)
        )  # a batch of one is taken for a constant
        bound = inspect.signature(model.forward).bind(*traced.args, **traced.kwargs)
        yield traced, {name: _dims(value, traced.batch_size) for name, value in bound.arguments.items()}


def compared(
    path: Path,
    format: str,
    call: Call,
    checks: Checks,
    write: Callable[[Path], None],
    load: Callable[[Path], nn.Module],
) -> Exported:
    """Write a file, load it, compare its outputs with the model's, and keep it only if they agree.

    Raises:
        ValueError: they do not.
    """
    calls = [call, doubled(call)] if checks.dynamic_batch else [call]
    with staged(path) as place:
        write(place)
        loaded = load(place)
        error = max(_error(list(tensors_of(one())), _run(one, loaded)) for one in calls)
        if not error <= checks.tolerance:
            raise ValueError(
                f"`tolerance` of the outputs is {checks.tolerance:g}, but got {error:.1e} from {format}: "
                "no file is left."
            )
        latencies = measure_latencies(call, replace(call, module=loaded)) if checks.latency else (None, None)
        num_bytes = sum(file.stat().st_size for file in place.parent.iterdir())
    return Exported(
        format, str(path), num_bytes, _state_bytes(call.module), error, checks.tolerance, *latencies
    )


def doubled(call: Call) -> Call:
    """Return a call with a batch of twice the size: each example comes again.

    Example:
        >>> doubled(Call(nn.ReLU(), (torch.zeros(3, 2),), {})).batch_size
        6
    """
    size = call.batch_size
    double: Callable[[Tensor], Tensor] = lambda t: torch.cat((t, t)) if _has_batch(t, size) else t  # noqa: E731
    args, kwargs = map_tensors(double, (call.args, dict(call.kwargs)))
    return replace(call, args=args, kwargs=kwargs)


def _run(call: Call, loaded: nn.Module) -> list[Tensor]:
    return list(tensors_of(loaded(*call.args, **call.kwargs)))


def _has_batch(tensor: Tensor, size: int | None) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == size


def _dims(value: Any, size: int | None) -> Any:
    """Return what torch.export is told of an argument: which dim of which tensor is dynamic."""
    if isinstance(value, Tensor):
        return {0: torch.export.Dim.DYNAMIC} if _has_batch(value, size) else None
    if isinstance(value, dict):
        return {key: _dims(entry, size) for key, entry in value.items()}
    return type(value)(_dims(entry, size) for entry in value) if type(value) in (tuple, list) else None


def _error(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest relative difference; numbers that are whole have to be equal."""
    if len(wanted) != len(found) or not wanted:
        return float("inf")
    if any(not torch.equal(a, b) for a, b in zip(wanted, found, strict=True) if not a.is_floating_point()):
        return float("inf")
    return largest_difference(wanted, found)


def _state_bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
