"""The report of a run as plain data: frozen dataclasses of numbers, text, tuples and mappings by name.

This is the lowest floor, standard library only: `model/cost.py` builds the costs, callbacks fill the rest, files and
pages read it. `None` always means "not measured", never zero; `Cost.unmeasured` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT_VERSION = (
    2  # 2: groups, acceleration, config, command, model, and where the median of a latency surely lies
)
KINDS = ("train_time", "post_training", "initial", "sparse_training", "rewinding", "none")


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
class Update:
    """One update of the masks.

    Args:
        step: optimizer steps done.
        progress: how much of the ramp lies behind, in [0, 1].
        requested: sparsity of the targets that was asked for, in [0, 1).
        achieved: sparsity of the targets that came of it.
        epoch: epochs done, if known.
        layers: sparsity of each target by name.
    """

    step: int
    progress: float
    requested: float
    achieved: float
    epoch: int | None = None
    layers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """One validation along the run: its metrics, and the sparsity of the targets at that time."""

    step: int
    sparsity: float
    metrics: Mapping[str, float]
    epoch: int | None = None


@dataclass(frozen=True)
class Layer:
    """A pruned weight as the run leaves it.

    Args:
        name: of the parameter.
        shape: of the parameter.
        params: number of its entries.
        nonzeros: number of its entries other than zero.
        num_groups: how many pieces it was pruned in, where the granularity is coarser than a weight.
        num_kept: how many of those are kept.
        macs_before: multiply-accumulates of the dense layer in the call of the report's costs.
        macs_after: the same afterwards: lower only where the layer has become smaller, not where it has zeros.
    """

    name: str
    shape: tuple[int, ...]
    params: int
    nonzeros: int
    num_groups: int | None = None
    num_kept: int | None = None
    macs_before: int | None = None
    macs_after: int | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of its entries that is zero."""
        return 1.0 - self.nonzeros / self.params if self.params else 0.0


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


@dataclass(frozen=True)
class Group:
    """Slices of several tensors that go together, or a block that goes as a whole.

    Args:
        name: of the group.
        role: "channel", "head", "head_dim", "block" or "branch".
        size: how many indices it had.
        kept: how many of them are kept.
        places: where it occurs in the model as the run leaves it, "name of a tensor[dim]".
    """

    name: str
    role: str
    size: int
    kept: int
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All that is told of one run.

    Args:
        kind: "train_time", "post_training", "initial", "sparse_training", "rewinding" or "none" (a run that pruned
            nothing).
        recipe: noun -> its text: sparsity, schedule, criterion, granularity, scope, window, include, exclude.
        target_sparsity: sparsity of the targets that was asked for in the end, in [0, 1).
        achieved_sparsity: sparsity of the targets in the end.
        layers: the targets, in the order of the model.
        updates: of the masks, in their order.
        evaluations: in their order.
        cost_before: of the dense model.
        cost_after: of the pruned model.
        metrics_before: of the dense model, where there was a trained one.
        metrics_after: of the pruned model.
        warnings: what the user should know.
        environment: versions, device, threads, seed.
        checkpoint: path of the pruned checkpoint.
        resume_command: how to go on with the run.
        load_command: how to load the result.
        equivalence_error: largest relative difference between the outputs of the masked and of the smaller model, in
            float64; None where the model did not become smaller.
        frozen: what could not become smaller, group or dim of a tensor -> the reason.
        acceleration: what kernels made for zeros would bring on this machine; None where it was not measured.
        groups: what goes together, where the granularity couples.
        model: name of the LightningModule's class.
        command: the command line of the run, where it had one.
        config: its composed configuration as yaml, with secrets left out.
        format_version: of this data model.
    """

    kind: str
    recipe: Mapping[str, str] = field(default_factory=dict)
    target_sparsity: float | None = None
    achieved_sparsity: float | None = None
    layers: tuple[Layer, ...] = ()
    updates: tuple[Update, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    cost_before: Cost | None = None
    cost_after: Cost | None = None
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    resume_command: str | None = None
    load_command: str | None = None
    equivalence_error: float | None = None
    frozen: Mapping[str, str] = field(default_factory=dict)
    acceleration: Acceleration | None = None
    groups: tuple[Group, ...] = ()
    model: str | None = None
    command: str | None = None
    config: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` is one of {list(KINDS)}, but got {self.kind!r}.")
