"""What pages are made of: plain data, without a word of HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from lightning_prune.report.tables import Table

Point: TypeAlias = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """A series of a line chart.

    Args:
        name: in the legend.
        points: (x, y) by ascending x; y is None where there is none.
        is_stepped: whether values hold until the next point.
        is_dashed: whether it is drawn as what was only asked for.
    """

    name: str
    points: tuple[Point, ...]
    is_stepped: bool = False
    is_dashed: bool = False


@dataclass(frozen=True)
class Lines:
    """A line chart.

    Args:
        title: above it.
        x: label of the x-axis.
        y: label of the y-axis.
        lines: drawn together.
        is_percent: whether y is a fraction that is shown in percent, from 0 to 100.
        choose: whether one line is shown at a time, and a menu chooses which.
        markers: whether points are not connected.
    """

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    is_percent: bool = False
    choose: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Bars:
    """A chart of horizontal bars.

    Args:
        title: above it.
        x: label of the value axis.
        labels: one for each row.
        series: name -> a value for each row, None where there is none.
        is_percent: whether values are fractions, shown in percent.
        intervals: whether values are (low, middle, high), drawn as an interval with a point.
    """

    title: str
    x: str
    labels: tuple[str, ...]
    series: tuple[tuple[str, tuple[float | tuple[float, float, float] | None, ...]], ...]
    is_percent: bool = False
    intervals: bool = False


@dataclass(frozen=True)
class Spot:
    """A point of a scatter plot: where it lies, the lines that tell of it, and how far its values are spread."""

    x: float
    y: float
    text: tuple[str, ...]
    x_spread: float = 0.0
    y_spread: float = 0.0


@dataclass(frozen=True)
class Spots:
    """Points of one kind. `look` is "plain", "joined" (by a line, in their order) or "star" (above all others)."""

    name: str
    spots: tuple[Spot, ...]
    look: str = "plain"


@dataclass(frozen=True)
class Scatter:
    """A scatter plot.

    Args:
        title: above it.
        x: label of the x-axis.
        y: label of the y-axis.
        kinds: of points, drawn one above the other.
        is_log: whether the x-axis is logarithmic.
        level: a value of y at which a dotted line runs across.
        level_name: what that line is.
    """

    title: str
    x: str
    y: str
    kinds: tuple[Spots, ...]
    is_log: bool = False
    level: float | None = None
    level_name: str = ""


@dataclass(frozen=True)
class Tile:
    """A figure that matters: its name, the value, and what it is compared with. `tone` is "", "good" or "same"."""

    label: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Tiles:
    """Figures side by side."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Facts:
    """Labels and texts."""

    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Items:
    """A list of texts; warnings stand out."""

    texts: tuple[str, ...]
    are_warnings: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it is typed or read by a machine, with a button that copies it."""

    label: str
    text: str


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when they are asked for."""

    summary: str
    parts: tuple[Part, ...]


Part: TypeAlias = "Lines | Bars | Scatter | Tiles | Facts | Items | Code | Fold | Table"


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Document:
    """A page.

    Args:
        title: of the page.
        sections: one below the other; empty ones are left out.
        subtitle: a line below the title.
    """

    title: str
    sections: tuple[Section, ...]
    subtitle: str = ""
