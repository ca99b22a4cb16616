"""What a model costs and how long it takes, as plain data. `None` always means "not measured", never zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Latency:
    """How long one call takes, in milliseconds: the median and the quartiles of repeated measurements.

    Args:
        median_ms: half of the measurements took less.
        low_ms: a quarter took less.
        high_ms: three quarters took less.
        num_measurements: how many there were.
        device: where the model ran, e.g. "cpu" or "cuda:0".
        num_threads: of the CPU.
        clock: "cpu" is the processor time of this process, which other programs disturb little; "wall" is the time
            on the clock, with the device synchronised.
        surely_above_ms: where the median itself lies, with 95 % confidence: not below this,
        surely_below_ms: and not above this. None where too few measurements tell.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    num_measurements: int
    device: str = "cpu"
    num_threads: int = 1
    clock: str = "cpu"
    surely_above_ms: float | None = None
    surely_below_ms: float | None = None


def differs(before: Latency, after: Latency) -> bool:
    """Whether one is measurably faster: their quartile intervals do not overlap.

    Measurements of different devices, numbers of threads or clocks are not comparable: no claim, False.

    Example:
        >>> differs(Latency(10.0, 9.0, 11.0, 20), Latency(8.0, 7.0, 8.5, 20))
        True
        >>> differs(Latency(10.0, 9.0, 11.0, 20), Latency(8.0, 7.0, 9.5, 20))
        False
    """
    comparable = (before.device, before.num_threads, before.clock) == (
        after.device,
        after.num_threads,
        after.clock,
    )
    return comparable and (before.low_ms > after.high_ms or after.low_ms > before.high_ms)


@dataclass(frozen=True)
class LayerCost:
    """What one weight costs.

    Args:
        name: of the parameter.
        shape: of the parameter.
        params: number of its entries.
        nonzeros: number of its entries other than zero.
        macs: multiply-accumulates of the call in which it takes part.
    """

    name: str
    shape: tuple[int, ...]
    params: int
    nonzeros: int | None = None
    macs: int | None = None


@dataclass(frozen=True)
class Cost:
    """What a model costs. None: not measured, and `unmeasured` says why.

    Args:
        params: number of parameters; tied ones count once.
        nonzeros: number of parameters other than zero.
        macs: multiply-accumulates of one call (matrix products, convolutions, attention), zeros included: what dense
            kernels do.
        effective_macs: the same, with those of each weight multiplied by its density: what would be left to a kernel
            that skips every zero. No ordinary kernel does.
        num_bytes: of the saved `state_dict`.
        gzip_bytes: of the same after gzip: zeros hardly count.
        latency: of one call.
        batch_size: of that call: the first dim of its first tensor.
        layers: weights of at least two dims, in the order of the model.
        unmeasured: name of a field above -> why it is None, or what it leaves out.
    """

    params: int
    nonzeros: int | None = None
    macs: int | None = None
    effective_macs: int | None = None
    num_bytes: int | None = None
    gzip_bytes: int | None = None
    latency: Latency | None = None
    batch_size: int | None = None
    layers: tuple[LayerCost, ...] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float | None:
        """The fraction of all parameters that is zero, biases and norms included; None where nonzeros are unknown."""
        return None if self.nonzeros is None or not self.params else 1.0 - self.nonzeros / self.params


@dataclass(frozen=True)
class LayerKernel:
    """A linear layer with the dense kernel and with one made for zeros, measured in turns on the same input.

    Args:
        name: of the layer.
        shape: of its weight.
        sparsity: of its weight, in [0, 1].
        num_rows: of its input: the product of all dims but the last.
        dense: how long the dense kernel takes.
        sparse: how long the sparse one takes; None where it was not measured.
        is_faster: whether the sparse kernel is measurably faster.
        reason: why it was not measured, or is not used.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    num_rows: int | None = None
    dense: Latency | None = None
    sparse: Latency | None = None
    is_faster: bool = False
    reason: str | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster the sparse kernel is, by the medians; None where it was not measured."""
        if self.dense is None or self.sparse is None or not self.sparse.median_ms:
            return None
        return self.dense.median_ms / self.sparse.median_ms


@dataclass(frozen=True)
class Acceleration:
    """What kernels made for zeros bring on this machine.

    Args:
        kernel: "csr" (compressed sparse rows, on the CPU) or "2:4" (semi-structured, on GPUs).
        layers: the linear layers, in the order of the model.
        is_converted: whether the layers that are faster were converted, rather than only measured.
        before: of one call of the model with dense kernels.
        after: of the same with the faster ones; None where nothing was converted.
        batch_size: of that call.
        error: largest difference between the outputs, relative to the largest output.
    """

    kernel: str
    layers: tuple[LayerKernel, ...]
    is_converted: bool = False
    before: Latency | None = None
    after: Latency | None = None
    batch_size: int | None = None
    error: float | None = None

    @property
    def num_converted(self) -> int:
        """How many layers run with the sparse kernel."""
        return sum(layer.is_faster for layer in self.layers) if self.is_converted else 0
