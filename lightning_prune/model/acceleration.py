"""Sparse kernels where they are faster, on this machine and for this batch size; dense ones everywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_prune.core.checks import check_positive
from lightning_prune.core.types import Name
from lightning_prune.model.calls import Call, call_of, replaying, tensors_of
from lightning_prune.model.equivalence import largest_difference
from lightning_prune.model.kernels import CSR, SECONDS, Kernel, first_sentence, is_faster, measure_kernels
from lightning_prune.model.latency import measure_latencies
from lightning_prune.model.semi_structured import check_device, semi_structured, why_not_semi_structured
from lightning_prune.model.sparse import places_of
from lightning_prune.report.costs import Acceleration

SEMI_STRUCTURED = Kernel("2:4", lambda layer: why_not_semi_structured(layer.weight), semi_structured)


def accelerate(
    model: nn.Module,
    example: Any,
    *,
    exclude: Sequence[str] = (),
    tolerance: float = 1e-4,
    seconds: float = SECONDS,
) -> Acceleration:
    """Give the linear layers of a pruned model sparse kernels (CSR) where those are faster here, in place.

    Each layer is measured on the input that it has in this call, so take an example of the batch size that will be
    used: what pays for 64 rows may not for one. Nothing is converted that is not measurably faster, nor anything if
    the model as a whole is not. Converted layers are for evaluation; their `state_dict` stays that of dense ones, and
    `densify(model)` turns them back. The measurement is of this process on one thread.

    Args:
        model: pruned, on the CPU; layers of 256 x 256 and more gain at 80 % and above, small ones hardly ever.
        example: its arguments: a tensor, a tuple of positional or a mapping of keyword arguments.
        exclude: patterns of layers or modules to leave alone.
        tolerance: largest difference of the outputs, relative to the largest one.
        seconds: of measuring each layer with each kernel, above 0.

    Returns:
        What was measured, layer by layer, and what was converted.

    Raises:
        ValueError: a value out of its range, or the converted model computes something else. It is then as it was.

    Example:
        >>> import torch
        >>> from lightning_prune import prune
        >>> _ = prune(net := nn.Sequential(nn.Linear(256, 256)), 0.4)
        >>> accelerate(net, torch.zeros(8, 256)).layers[0].reason
        'less than 50 % sparse'
    """
    return _accelerate_(model, example, CSR, exclude, tolerance, seconds)


def to_semi_structured(
    model: nn.Module,
    example: Any,
    *,
    exclude: Sequence[str] = (),
    tolerance: float = 1e-2,
    seconds: float = SECONDS,
) -> Acceleration:
    """Give the linear layers of a 2:4 pruned model the kernels of sparse tensor cores where those are faster, in place.

    It takes an NVIDIA GPU of compute capability 8.0 and above, and weights in float16 or bfloat16 with rows that are a
    multiple of 32 and columns of 64. Export weights before: a converted model's `state_dict` holds compressed tensors.

    Args:
        model: pruned with `NofM(2, 4)`, on a GPU.
        example: as for `accelerate`.
        exclude: the same.
        tolerance: the same; in 16 bits, sums in another order differ more.
        seconds: the same.

    Raises:
        ValueError: as for `accelerate`, or the model lies on no such GPU.

    Example:
        >>> to_semi_structured(model.cuda().half(), example.cuda().half())  # doctest: +SKIP
    """
    check_device(model)
    return _accelerate_(model, example, SEMI_STRUCTURED, exclude, tolerance, seconds)


def _accelerate_(
    model: nn.Module, example: Any, kernel: Kernel, exclude: Sequence[str], tolerance: float, seconds: float
) -> Acceleration:
    check_positive("tolerance", tolerance)
    call = call_of(model, example)
    found = measure_kernels(model, call, kernel, exclude=exclude, seconds=seconds)
    layers = {layer.name: model.get_submodule(layer.name) for layer in found.layers if layer.is_faster}
    if not layers:
        return found
    switch = Switch(model, layers, kernel)
    with ExitStack() as undo:
        undo.callback(switch.to, False)
        with replaying(model, call) as replayed:
            error = _error(replayed, switch)
            if not error <= tolerance:
                raise ValueError(
                    f"`tolerance` of the outputs is {tolerance:g}, but got {error:.1e} with sparse kernels for "
                    f"{list(layers)}: leave out what reads their weights by itself with `exclude`."
                )
            before, after = measure_latencies(
                SwitchedCall.of(replayed, switch, False),
                SwitchedCall.of(replayed, switch, True),
                seconds=5 * seconds,
            )
        found = replace(found, before=before, after=after, error=error)
        if not is_faster(before, after):
            return found
        switch.to(False)  # the dense layers are back in training mode by now, if they were
        switch.to(True)
        undo.pop_all()
    return replace(found, is_converted=True)


class Switch:
    """Layers of a model in two forms, which can be exchanged for one another in place."""

    def __init__(self, model: nn.Module, layers: Mapping[Name, nn.Module], kernel: Kernel) -> None:
        self.is_sparse = False
        self._places = [
            (places_of(model, layer), layer, kernel.convert(layer))  # type: ignore[arg-type]
            for layer in layers.values()
        ]

    def to(self, is_sparse: bool) -> None:
        """Put the one form or the other into all places."""
        if is_sparse != self.is_sparse:
            self.is_sparse = is_sparse
            for places, dense, sparse in self._places:
                sparse.training = dense.training
                for parent, name in places:
                    parent._modules[name] = sparse if is_sparse else dense


@dataclass(frozen=True, eq=False)
class SwitchedCall(Call):
    """A call of a model with its layers in one of two forms."""

    switch: Switch | None = None
    is_sparse: bool = False

    @classmethod
    def of(cls, call: Call, switch: Switch, is_sparse: bool) -> SwitchedCall:
        """Return the same call with the layers in one form."""
        return cls(
            call.module, call.args, call.kwargs, call.autocast, call.ran, switch=switch, is_sparse=is_sparse
        )

    def __call__(self) -> Any:
        """Exchange the layers if need be, and run the module once more."""
        assert self.switch is not None
        self.switch.to(self.is_sparse)
        return super().__call__()


def _error(call: Call, switch: Switch) -> float:
    switch.to(False)
    wanted = list(tensors_of(call()))
    switch.to(True)
    try:
        return largest_difference(wanted, list(tensors_of(call())))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`model` runs with sparse kernels, but got {type(error).__name__}: {first_sentence(error)}. "
            "Leave out what reads the weights of its layers by itself with `exclude`."
        ) from error
