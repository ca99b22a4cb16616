"""Kernels made for zeros, measured layer by layer against dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_prune.core.checks import check_positive
from lightning_prune.core.patterns import check_match, matches
from lightning_prune.core.types import Name
from lightning_prune.model.calls import Call, replaying
from lightning_prune.model.latency import measure_latencies
from lightning_prune.model.plain import is_plain
from lightning_prune.model.shards import num_nonzeros
from lightning_prune.model.sparse import SparseLinear, places_of
from lightning_prune.report.costs import Acceleration, Latency, LayerKernel, differs

MIN_SPARSITY = 0.5
"""Below, it is not worth the time to measure; above, the clock decides."""
MIN_ENTRIES = 2**14
SECONDS = 0.2
FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Their own kernels read the weights of the layers in them."""


@dataclass(frozen=True)
class Kernel:
    """A kernel made for zeros: which layers it cannot take, and how one is converted."""

    name: str
    why_not: Callable[[nn.Linear], str | None]
    convert: Callable[[nn.Linear], nn.Module]


def why_not_csr(layer: nn.Linear) -> str | None:
    """Return why compressed rows are not worth measuring for a layer, or None."""
    if layer.weight.device.type != "cpu":
        return f"on {layer.weight.device}, not on the CPU"
    if layer.weight.numel() < MIN_ENTRIES:
        return "too small to pay"
    return (
        f"less than {MIN_SPARSITY:.0%} sparse".replace("%", " %") if _sparsity(layer) < MIN_SPARSITY else None
    )


CSR = Kernel("csr", why_not_csr, SparseLinear)


def measure_kernels(
    model: nn.Module,
    call: Call,
    kernel: Kernel = CSR,
    *,
    exclude: Sequence[str] = (),
    seconds: float = SECONDS,
    max_layers: int | None = None,
) -> Acceleration:
    """Measure each linear layer of a model with a sparse kernel and the dense one, in turns; nothing is converted.

    Args:
        model: it stays as it is.
        call: of it, or of a part of it.
        kernel: which is compared.
        exclude: patterns of layers to leave alone.
        seconds: of measuring each layer with each kernel.
        max_layers: how many are measured at most, the largest; None is all.
    """
    check_positive("seconds", seconds)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for pattern in exclude:
        check_match("exclude", pattern, layers)
    reasons = {name: _why_not(model, name, layer, kernel, exclude) for name, layer in layers.items()}
    tried = sorted((n for n in layers if reasons[n] is None), key=lambda n: -layers[n].weight.numel())
    if max_layers is not None:
        reasons |= dict.fromkeys(tried[max_layers:], f"only the {max_layers} largest are measured")
    wanted = {id(layer): layer for name, layer in layers.items() if reasons[name] is None}
    with replaying(model, call) as replayed:
        inputs = _inputs(replayed, wanted.values())
        found = [
            _measured(n, layer, reasons[n], inputs.get(id(layer)), kernel, seconds)
            for n, layer in layers.items()
        ]
    return Acceleration(kernel.name, tuple(found), batch_size=call.batch_size)


def is_faster(before: Latency, after: Latency) -> bool:
    """Whether `after` is measurably shorter."""
    return differs(before, after) and after.median_ms < before.median_ms


def first_sentence(error: Exception) -> str:
    """Return what an error says first; of a missing kernel, torch goes on with all that there are."""
    return str(error).partition("\n")[0].partition(". ")[0]


def _why_not(
    model: nn.Module, name: Name, layer: nn.Linear, kernel: Kernel, exclude: Sequence[str]
) -> str | None:
    if any(matches(pattern, name) for pattern in exclude):
        return "excluded"
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, no plain nn.Linear"
    if layer is model:
        return "the model itself: there is no module to put another into"
    if any(isinstance(parent, FUSED) for parent, _ in places_of(model, layer)):
        return "read by a fused kernel of torch"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "has hooks"
    return kernel.why_not(layer) if is_plain(layer.weight) else f"a weight of {type(layer.weight).__name__}"


def _inputs(call: Call, layers: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Return the input that each layer has in a call, the first one where there are several."""
    found: dict[int, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            found.setdefault(id(layer), args[0].detach().clone())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(note).remove)
        call()
    return found


def _measured(
    name: Name, layer: nn.Linear, reason: str | None, x: Tensor | None, kernel: Kernel, seconds: float
) -> LayerKernel:
    told = LayerKernel(name, tuple(layer.weight.shape), _sparsity(layer), reason=reason)
    if reason is not None or x is None:
        return replace(told, reason=reason or "not called")
    try:
        calls = [Call(module, (x,), {}) for module in (layer, kernel.convert(layer))]
        dense, sparse = measure_latencies(*calls, seconds=seconds)
    except (RuntimeError, ValueError) as error:  # NotImplementedError among them: no kernel for this dtype
        return replace(told, reason=f"not measured: {first_sentence(error)}")
    num_rows = x.numel() // x.shape[-1]
    return replace(told, num_rows=num_rows, dense=dense, sparse=sparse, is_faster=is_faster(dense, sparse))


def _sparsity(layer: nn.Linear) -> float:
    return 1.0 - num_nonzeros(layer.weight) / max(1, layer.weight.numel())
