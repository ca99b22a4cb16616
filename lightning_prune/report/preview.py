"""What a run would do, as plain data: targets, groups, costs, times, troubles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_prune.report.costs import Cost
from lightning_prune.report.data import Group

PREVIEW_VERSION = 1


@dataclass(frozen=True)
class PlannedUpdate:
    """An update of the masks that will fall due.

    Args:
        step: optimizer steps done by then.
        requested: sparsity of the targets that will be asked for, in [0, 1).
        epoch: epochs done by then, where their length is known.
    """

    step: int
    requested: float
    epoch: float | None = None


@dataclass(frozen=True)
class PlannedLayer:
    """A weight now, and as the run is expected to leave it.

    Args:
        name: of the parameter.
        is_target: whether it is pruned itself; others may lose inputs or outputs with it.
        shape: now.
        shape_after: in the end.
        params: number of its entries now.
        params_after: in the end.
        nonzeros_after: number of its entries other than zero, in the end.
        macs: multiply-accumulates of the example call now, where they can be counted.
        macs_after: in the end; zeros count, as they do for dense kernels.
        num_bytes: of its entries now.
        num_bytes_after: in the end, zeros included.
    """

    name: str
    is_target: bool
    shape: tuple[int, ...]
    shape_after: tuple[int, ...]
    params: int
    params_after: int
    nonzeros_after: int | None
    macs: int | None
    macs_after: int | None
    num_bytes: int
    num_bytes_after: int


@dataclass(frozen=True)
class Preview:
    """What a recipe would do to a model: `print(preview(...))`.

    Args:
        kind: when it prunes, as in a `Report`.
        recipe: noun -> its text.
        model: name of the module's class.
        target_sparsity: what is asked for in the end; None where a budget decides and is out of reach.
        targets: names of the weights that are pruned, or of the blocks that may go.
        left_out: name of a weight -> why it is none of them.
        layers: all weights of at least two dims, in the order of the model.
        cost_before: of the model now.
        cost_after: as expected in the end; None where it cannot be told.
        groups: what goes together, and how many indices of it would be kept.
        frozen: what cannot become smaller -> the reason.
        updates: when the masks are updated, as far as the length of the run is known.
        when: the same in words.
        notes: how far the figures are exact.
        risks: layers of which very little would be left.
        troubles: why the run would be refused, or would not reach what it is asked for.
        version: of this data model.
    """

    kind: str
    recipe: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    target_sparsity: float | None = None
    targets: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[PlannedLayer, ...] = ()
    cost_before: Cost | None = None
    cost_after: Cost | None = None
    groups: tuple[Group, ...] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    updates: tuple[PlannedUpdate, ...] = ()
    when: str = ""
    notes: tuple[str, ...] = ()
    risks: tuple[str, ...] = ()
    troubles: tuple[str, ...] = ()
    version: int = PREVIEW_VERSION

    @property
    def is_fine(self) -> bool:
        """Whether nothing stands against the run."""
        return not self.troubles

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        from lightning_prune.report.preview_rows import page
        from lightning_prune.report.render import page_to_rich

        console = Console(file=StringIO(), width=110, color_system=None)
        console.print(page_to_rich(page(self)))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in str(text).strip().splitlines())


def to_json(preview: Preview) -> str:
    """Return a preview as JSON text.

    Example:
        >>> json.loads(to_json(Preview("none")))["troubles"]
        []
    """
    return json.dumps({**dataclasses.asdict(preview), "is_fine": preview.is_fine}, indent=1) + "\n"
