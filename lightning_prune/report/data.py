"""The report of a run as plain data: frozen dataclasses of numbers, text, tuples and mappings by name.

This is the lowest floor, standard library only: `model/cost.py` builds the costs, callbacks fill the rest, files and
pages read it. `None` always means "not measured", never zero; `Cost.unmeasured` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_prune.report.costs import Acceleration, Cost

# 2: groups, acceleration, config, command, model, and where the median of a latency surely lies
FORMAT_VERSION = 3  # 3: with a budget, no update requests a sparsity
KINDS = ("train_time", "post_training", "initial", "sparse_training", "rewinding", "none")


@dataclass(frozen=True)
class Update:
    """One update of the masks.

    Args:
        step: optimizer steps done.
        progress: how much of the ramp lies behind, in [0, 1].
        requested: sparsity of the targets that was asked for, in [0, 1); None where that is a budget.
        achieved: sparsity of the targets that came of it.
        epoch: epochs done, if known.
        layers: sparsity of each target by name.
    """

    step: int
    progress: float
    requested: float | None
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
        target_sparsity: sparsity of the targets that was asked for in the end, in [0, 1); None where a budget was.
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

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets that were asked for in place of a sparsity, as text."""
        nouns = {noun: text for noun, text in self.recipe.items() if str(noun).split(" (")[0] == "budget"}
        return tuple(text for text in nouns.values() if text not in ("None", ""))
