"""A sweep in the terminal: what differs, what came of it, what went wrong, and what to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.core.directions import words_of
from lightning_prune.report.fitting import Fitting
from lightning_prune.sweep.rows import PARTS, SIZES, Row, differing, numbers_in

if TYPE_CHECKING:
    from lightning_prune.sweep.summary import Summary

SHOWN = frozenset(("sparsity", *(word for part in PARTS for word in part)))
"""First words of the columns of a table."""
SIZES_SHOWN = 3


def show(summary: Summary, written: Sequence[Path], notes: Sequence[str]) -> None:
    """Print a sweep.

    Args:
        summary: of the sweep.
        written: the files, that of all columns first.
        notes: what else is to be said.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    rows = summary.groups if summary.is_repeated else summary.rows
    console.print(Fitting(partial(_table, rows, shown_columns(rows, summary.sizes)), spare_columns(summary)))
    for row in summary.rows:
        if "error" in row:
            line(f"job {row['job']} failed: {row['error']}", "red")
        elif row["status"] != "done":
            line(f"job {row['job']} is {row['status']}: {settings_text(row, summary.rows)}", "yellow")
    if summary.recommendation:
        line(f"recommended: {choice_text(summary)}", "bold")
    for note in notes:
        line(note)
    line(f"all columns: {written[0]}")
    for path in written[1:]:
        line(f"also: {path}")
    if summary.command:
        line(f"the rest: {summary.command}")


def choice_text(summary: Summary) -> str:
    """Say which model is recommended, and why."""
    chosen = summary.recommendation
    assert chosen is not None
    row = chosen.row
    what = settings_text(row, summary.groups)
    quality = f"{chosen.metric} {number_text(row, chosen.metric)}"
    return f"{what} ({quality}, {chosen.size} {number_text(row, chosen.size)}): {chosen.rule}"


def settings_text(row: Row, rows: Sequence[Row]) -> str:
    """Return a row's settings, of those in which the rows differ; if there are none, its jobs."""
    text = " ".join(f"{name}={short(row[name])}" for name in differing(rows) if name in row)
    return text or f"job {row.get('job') or row.get('jobs')}"


def number_text(row: Row, column: str) -> str:
    """Return a number to be read, of several seeds with its standard deviation.

    Example:
        >>> number_text({"val/acc": 0.97812, "val/acc sd": 0.00312}, "val/acc")
        '0.9781 ± 0.0031'
    """
    value, deviation = row.get(column), row.get(f"{column} sd")
    spread = f" ± {_number(deviation)}" if deviation else ""
    if value is None:
        return ""
    return f"{_number(value)}{spread}" if isinstance(value, (int, float)) else short(str(value))


def short(text: str) -> str:
    """Return a setting as text, a long number rounded.

    Example:
        >>> short("0.7215100938814073"), short("0.95"), short("pruning"), short("1e-4")
        ('0.7215', '0.95', 'pruning', '1e-4')
    """
    try:
        return f"{float(text):.4g}" if len(text) > 8 else text
    except ValueError:
        return text


def shown_columns(rows: Sequence[Row], sizes: Sequence[str] = ()) -> list[str]:
    """Return the columns that matter: the settings that differ, the metrics, the sizes, how a job ended."""
    numbers = numbers_in(rows)
    metrics = [c for c in numbers if is_shown(c)]
    metrics = [c for c in metrics if not c.endswith("loss")] or metrics
    ends = [c for c in ("num_jobs", "status") if any(c in row for row in rows)]
    first = ["job"] if any("job" in row for row in rows) else []
    return [*first, *differing(rows), *metrics, *[s for s in SIZES if s in sizes][:SIZES_SHOWN], *ends]


def is_shown(column: str) -> bool:
    """Whether a column of numbers is a metric of validation or test data, or the sparsity.

    Example:
        >>> [is_shown(column) for column in ("val/acc", "test_mse", "sparsity", "train/loss", "dense/val/acc")]
        [True, True, True, False, False]
    """
    return next(iter(words_of(column)), "") in SHOWN


def heads(columns: Sequence[str]) -> list[str]:
    """Return columns as they are headed: of settings the last part, where that is no other's.

    Example:
        >>> heads(["job", "pruning.sparsity", "pruning/scope", "val/acc", "sparsity"])
        ['job', 'pruning.sparsity', 'scope', 'val/acc', 'sparsity']
    """
    tails = [column.replace("/", ".").rpartition(".")[2] for column in columns]
    return [
        tail if tails.count(tail) == 1 and not is_shown(column) else column
        for tail, column in zip(tails, columns, strict=True)
    ]


def spare_columns(summary: Summary) -> list[str]:
    """Return the columns that a narrow terminal leaves out: what was reached of what was asked for, further metrics."""
    rows = summary.groups if summary.is_repeated else summary.rows
    shown = [column for column in shown_columns(rows, summary.sizes) if is_shown(column)]
    asked = [c for c in shown if c == "sparsity" and any(s.endswith(".sparsity") for s in differing(rows))]
    others = [c for c in shown if c not in (summary.metric, "sparsity")]
    sizes = [c for c in summary.sizes[:SIZES_SHOWN] if c != summary.size]
    ended = ["status"] if all(row.get("status") == "done" for row in rows) else []
    return [*asked, *others, *ended, *reversed(sizes)]


def _table(rows: Sequence[Row], columns: Sequence[str], left_out: Sequence[str] = ()) -> Any:
    from rich.table import Table
    from rich.text import Text

    columns = [column for column in columns if column not in left_out]
    table = Table()
    for column in heads(columns):
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(number_text(row, column)) for column in columns))
    return table


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4f}"
