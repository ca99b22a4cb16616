"""What a model costs: parameters, nonzeros, multiply-accumulates, bytes, latency. Nothing of it changes the model."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.model.calls import Call as Call
from lightning_prune.model.calls import CallCatcher as CallCatcher
from lightning_prune.model.calls import capture_call as capture_call
from lightning_prune.model.calls import replaying
from lightning_prune.model.latency import dense_twin, measure_latencies
from lightning_prune.model.macs import count_macs
from lightning_prune.model.shards import has_shards, num_nonzeros
from lightning_prune.report.costs import Cost, Latency, LayerCost

SHARDED = "the weights are spread over processes"
UNMEASURED = ("num_bytes", "gzip_bytes", "macs", "effective_macs", "latency")
MAX_GZIP_BYTES = 256 * 2**20  # above it, compression takes longer than its number is worth (about 10 s)


def measure(
    model: nn.Module, call: Call | None = None, *, latency: bool = True, compress: bool = True
) -> Cost:
    """Measure what a model costs.

    The call is run in eval mode without gradients; training flags, buffers and random states are as before. What
    cannot be measured is None, and `unmeasured` says why: a model that trains is never stopped by this.

    Args:
        model: any module.
        call: an example call of it or of a part of it (`capture_call`); without one there are no MACs and no latency.
        latency: whether to measure it, which takes a second and more.
        compress: whether to measure the file after gzip, which takes seconds for millions of weights.

    Returns:
        The cost. MACs count zeros too, as dense kernels do; effective MACs multiply those of each weight by its
        density; bytes are those of the saved `state_dict`, plain and after gzip.

    Example:
        >>> net = nn.Linear(3, 4, bias=False)
        >>> cost = measure(net, Call(net, (torch.ones(2, 3),), {}), latency=False)
        >>> cost.params, cost.macs, cost.batch_size
        (12, 24, 2)
    """
    if has_shards(model):
        return _without(_with_sizes(Cost(params=0), model), SHARDED, *UNMEASURED)
    cost = _with_sizes(_with_bytes(Cost(params=0), model, compress), model)
    if call is None:
        return _without(cost, "no call of the model was seen", "macs", "effective_macs", "latency")
    cost = _with_macs(replace(cost, batch_size=call.batch_size), model, call)
    return _with_latency(cost, model, call) if latency else _without(cost, "not asked for", "latency")


def compare_with_dense(
    model: nn.Module, call: Call, before: Cost, after: Cost, dense: nn.Module | None = None
) -> tuple[Cost, Cost]:
    """Return the costs before and after with latencies of the masked model and of its dense twin, taken in turns.

    Two measurements hours apart compare the load of the machine rather than the models.

    Args:
        model: the masked model as it is now.
        call: an example call of it or of a part of it.
        before: cost of the dense model.
        after: cost of the masked model.
        dense: what was called before the model became smaller; by default the masked model without its zeros.
    """
    try:
        with replaying(model, call) as masked:
            twin = dense_twin(masked) if dense is None else replace(masked, module=dense.eval())
            dense_latency, masked_latency = measure_latencies(twin, masked)
    except Exception as error:
        return _without_latency(before, error), _without_latency(after, error)
    return _with(before, latency=dense_latency), _with(after, latency=masked_latency)


def _with_sizes(cost: Cost, model: nn.Module) -> Cost:
    parameters = {n: p for n, p in model.named_parameters() if not is_lazy(p)}
    is_known = not any(p.is_meta for p in parameters.values())
    counts = {n: num_nonzeros(p) if is_known else None for n, p in parameters.items()}
    rows = tuple(
        LayerCost(n, tuple(p.shape), p.numel(), counts[n]) for n, p in parameters.items() if p.dim() >= 2
    )
    nonzeros = sum(count or 0 for count in counts.values()) if is_known else None
    cost = replace(cost, params=sum(p.numel() for p in parameters.values()), nonzeros=nonzeros, layers=rows)
    cost = cost if is_known else _without(cost, "the model is on the meta device, without values", "nonzeros")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        return _without(cost, f"left out, without a shape yet: {', '.join(lazy)}", "params")
    return cost


def _with_macs(cost: Cost, model: nn.Module, call: Call) -> Cost:
    try:
        with replaying(model, call) as replay:
            found = count_macs(model, replay)
    except Exception as error:
        return _without(cost, _reason(error), "macs", "effective_macs")
    if found.unknown:
        reason = f"torch's flop counter has no formula for {', '.join(sorted(found.unknown))}"
        return _without(cost, reason, "macs", "effective_macs")
    layers = tuple(replace(layer, macs=found.by_name[layer.name]) for layer in cost.layers)
    cost = replace(cost, macs=found.total, effective_macs=found.effective, layers=layers)
    if found.foreign:
        return _without(cost, f"left out, without a formula: {', '.join(sorted(found.foreign))}", "macs")
    return cost


def _with_latency(cost: Cost, model: nn.Module, call: Call) -> Cost:
    try:
        with replaying(model, call) as replay:
            (latency,) = measure_latencies(replay)
    except Exception as error:
        return _without_latency(cost, error)
    return _with(cost, latency=latency)


def _with_bytes(cost: Cost, model: nn.Module, compress: bool) -> Cost:
    try:
        state = model.state_dict()
        size = sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, Tensor))
        sink = _Sink(compress=compress and size <= MAX_GZIP_BYTES)
        torch.save(state, sink)  # type: ignore[arg-type]
    except Exception as error:
        return _without(cost, _reason(error), "num_bytes", "gzip_bytes")
    cost = replace(cost, num_bytes=sink.num_bytes, gzip_bytes=sink.finish())
    if not compress:
        return _without(cost, "not asked for", "gzip_bytes")
    if cost.gzip_bytes is None:
        return _without(cost, f"skipped above {MAX_GZIP_BYTES // 2**20} MiB", "gzip_bytes")
    return cost


class _Sink(io.RawIOBase):
    """A file that keeps nothing: it counts what is written to it, and what gzip would make of that."""

    def __init__(self, *, compress: bool) -> None:
        self.num_bytes = 0
        self._num_compressed = 0
        self._gzip = zlib.compressobj(wbits=31) if compress else None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.num_bytes += size
        if self._gzip:
            self._num_compressed += len(self._gzip.compress(data))
        return size

    def finish(self) -> int | None:
        """Return the compressed size, or None where nothing was compressed."""
        return self._num_compressed + len(self._gzip.flush()) if self._gzip else None


def _with(cost: Cost, latency: Latency) -> Cost:
    unmeasured = {name: reason for name, reason in cost.unmeasured.items() if name != "latency"}
    return replace(cost, latency=latency, unmeasured=unmeasured)


def _without_latency(cost: Cost, error: Exception) -> Cost:
    return _without(replace(cost, latency=None), _reason(error), "latency")


def _without(cost: Cost, reason: str, *names: str) -> Cost:
    return replace(cost, unmeasured={**cost.unmeasured, **dict.fromkeys(names, reason)})


def _reason(error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
