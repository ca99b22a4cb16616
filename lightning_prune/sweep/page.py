"""`sweep.html`: what to take and why, the front to move a finger over, what is missing, and all rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_prune.report.page.html import to_html as written
from lightning_prune.report.page.parts import (
    Code,
    Document,
    Facts,
    Items,
    Part,
    Scatter,
    Section,
    Spot,
    Spots,
    Tile,
    Tiles,
)
from lightning_prune.report.tables import Table
from lightning_prune.sweep.choice import pareto_front
from lightning_prune.sweep.rows import Row, differing
from lightning_prune.sweep.terminal import heads, number_text, settings_text, short, shown_columns

if TYPE_CHECKING:
    from lightning_prune.sweep.summary import Summary

REPORT = "report.json"  # of a run
WIDE = 5.0  # how many times as large the largest model is where sizes are drawn on a logarithmic scale
STAR = "★ "
NOTES = (
    "The front holds the models that no other beats: none is as small or smaller and better, nor as good or better "
    "and smaller.",
    "Of several seeds there is the mean ± standard deviation (of the sample, divided by n - 1).",
    "nonzeros counts weights other than zero, whether they were masked or taken out; params, num_bytes, macs and "
    "latency_ms shrink only where layers have become smaller. A measure in which the models do not differ, or a "
    "latency whose quartiles overlap in all of them, is not drawn.",
    "Latencies of jobs that ran at the same time on one machine disturb each other: measure those that matter again.",
)


def to_html(summary: Summary) -> str:
    """Return the page."""
    return written(document(summary))


def document(summary: Summary) -> Document:
    """Return what the page shows."""
    done = sum(row["status"] == "done" for row in summary.rows)
    return Document(
        title=f"Sweep: {summary.folder.resolve().name}",
        subtitle=f"{done} of {len(summary.rows)} jobs done",
        sections=(
            Section("Recommended", _recommended(summary)),
            Section("Still missing", _missing(summary)),
            Section("Quality and size", _scatters(summary)),
            Section("Settings", (_table(summary, summary.groups),) if summary.is_repeated else ()),
            Section("Jobs", (_table(summary, summary.rows),)),
            Section("How to read this", (Items(NOTES),)),
        ),
    )


def _recommended(summary: Summary) -> tuple[Part, ...]:
    chosen = summary.recommendation
    if chosen is None:
        return ()
    row = chosen.row
    quality = Tile(chosen.metric, number_text(row, chosen.metric), f"to be reached: {chosen.bound:.4g}")
    sizes = dict.fromkeys((chosen.size, *summary.sizes))
    tiles = (quality, *(Tile(size, number_text(row, size), _share(row, size)) for size in sizes))
    settings = [(name, short(row[name])) for name in differing(summary.groups) if name in row]
    facts = Facts((("why", f"{chosen.rule}."), *settings, ("jobs", str(row["jobs"]))))
    command = _load_command(summary, str(row["jobs"]).split()[0])
    return (Tiles(tiles), facts, *([Code("Load it, in Python", command)] if command else []))


def _share(row: Row, size: str) -> str:
    dense = row.get(f"dense/{size}")
    if size == "latency_ms" and not is_measurable(row):
        return "no measurable difference to the dense model's"
    return f"{row[size] / dense:.0%} of the dense model's" if dense else ""


def is_measurable(row: Row) -> bool:
    """Whether a model's latency differs from the dense one's: their quartiles do not overlap."""
    names = ("latency_low_ms", "latency_high_ms", "dense/latency_low_ms", "dense/latency_high_ms")
    if not all(name in row for name in names):
        return False
    low, high, dense_low, dense_high = (row[name] for name in names)
    return bool(high < dense_low or low > dense_high)


def _load_command(summary: Summary, job: str) -> str | None:
    """Return what the report of a run says on how to load its result."""
    try:
        report = json.loads((summary.folder / job / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report.get("load_command") if isinstance(report, dict) else None


def _missing(summary: Summary) -> tuple[Part, ...]:
    lines = [
        f"job {row['job']} ({settings_text(row, summary.rows)}): {row.get('error') or row['status']}"
        for row in summary.rows
        if row["status"] != "done"
    ]
    if not lines:
        return ()
    command = [Code("This runs what is missing", summary.command)] if summary.command else []
    return (Items(tuple(lines), are_warnings=True), *command)


def _scatters(summary: Summary) -> tuple[Scatter, ...]:
    if summary.metric is None:
        return ()
    return tuple(_scatter(summary, summary.metric, size) for size in summary.sizes)


def _scatter(summary: Summary, metric: str, size: str) -> Scatter:
    chosen = summary.recommendation
    known = [row for row in summary.groups if metric in row and size in row]
    front = pareto_front(known, metric, size, summary.mode)
    others = [row for row in known if not any(row is of_front for of_front in front)]
    stars = [chosen.row] if chosen and size in chosen.row else []
    kinds = (("others", others, "plain"), ("front", front, "joined"), ("recommended", stars, "star"))
    values = [row[size] for row in known]
    return Scatter(
        title=f"{metric} and {size}",
        x=size,
        y=metric,
        kinds=tuple(
            Spots(name, tuple(_spot(summary, row, metric, size) for row in rows), look)
            for name, rows, look in kinds
        ),
        is_log=bool(values) and min(values) > 0 and max(values) > WIDE * min(values),
        level=chosen.bound if chosen else None,
        level_name="good enough",
    )


def _spot(summary: Summary, row: Row, metric: str, size: str) -> Spot:
    facts = [f"{c} {number_text(row, c)}" for c in (metric, size, "sparsity") if c in row]
    text = (settings_text(row, summary.groups), *facts, f"jobs {row['jobs']}")
    return Spot(row[size], row[metric], text, row.get(f"{size} sd", 0.0), row.get(f"{metric} sd", 0.0))


def _table(summary: Summary, rows: Sequence[Row]) -> Table:
    columns = shown_columns(rows, summary.sizes)
    chosen = set(str(summary.recommendation.row["jobs"]).split()) if summary.recommendation else set()

    def cells(row: Row) -> tuple[str, ...]:
        first, *others = (number_text(row, column) for column in columns)
        is_chosen = bool(chosen & set(str(row.get("jobs", row.get("job"))).split()))
        return (f"{STAR if is_chosen else ''}{first}", *others)

    return Table("", tuple(heads(columns)), tuple(cells(row) for row in rows), is_sortable=True)
