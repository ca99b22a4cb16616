"""All that is told of a sweep: put together once, then written as a table, a picture and a page, and shown."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_prune.core.checks import check_choice
from lightning_prune.core.directions import checked_mode
from lightning_prune.report.storage import write_text
from lightning_prune.sweep import terminal
from lightning_prune.sweep.choice import TOLERANCE, Recommendation, default_size, recommend, sizes_in
from lightning_prune.sweep.notes import resume_command
from lightning_prune.sweep.page import to_html
from lightning_prune.sweep.rows import (
    SEEDS,
    Row,
    default_metric,
    group_rows,
    numbers_in,
    read_jobs,
    sorted_rows,
)

TABLE_FILE, MEANS_FILE, PICTURE_FILE, PAGE_FILE = "sweep.csv", "sweep_means.csv", "sweep.png", "sweep.html"


@dataclass(frozen=True)
class Summary:
    """What a sweep has come to.

    Args:
        folder: of the sweep.
        rows: one for each job, best first.
        groups: one for each setting over its seeds, best first.
        metric: the column of quality, where there is one.
        mode: "min" or "max", what is better of it.
        size: the column of size, where there is one.
        sizes: all measures of size in which the models differ.
        recommendation: the model to take, where there is one.
        command: runs what is missing, where something is and the command is known.
    """

    folder: Path
    rows: Sequence[Row]
    groups: Sequence[Row]
    metric: str | None
    mode: str | None
    size: str | None
    sizes: Sequence[str]
    recommendation: Recommendation | None
    command: str | None

    @property
    def is_repeated(self) -> bool:
        """Whether any setting ran with several seeds."""
        return any(group["num_jobs"] > 1 for group in self.groups)


def summarise(
    folder: str | Path,
    sort_by: str | None = None,
    *,
    metric: str | None = None,
    mode: str | None = None,
    size: str | None = None,
    tolerance: float = TOLERANCE,
    seeds: Collection[str] = SEEDS,
) -> Summary:
    """Read a sweep's folder, at any time, and choose.

    Args:
        folder: of a Hydra multirun.
        sort_by: a column, best first; by default the metric.
        metric: the column of quality to choose by; by default of validation, accuracy before perplexity before loss.
        mode: "min" or "max", what is better of the metric; by default as its name says.
        size: the column of size to choose by; by default the first of nonzeros, params, num_bytes, ... that differs.
        tolerance: what the recommended model may lose, as `recommend` says.
        seeds: names of the overrides that are repetitions.

    Raises:
        ValueError: there are no jobs in the folder, no such column, or no mode and a name that does not tell.
    """
    folder = Path(folder)
    jobs = read_jobs(folder)
    groups = group_rows(jobs, seeds)
    metric = metric or default_metric(groups)
    if metric is not None:
        check_choice("metric", metric, numbers_in(groups))
        mode = checked_mode(metric, mode)
    rows = sorted_rows(jobs, sort_by or metric, mode if sort_by in (None, metric) else None)
    known = {column for group in groups for column in group}
    return Summary(
        folder=folder,
        rows=rows,
        groups=sorted_rows(groups, *((sort_by, None) if sort_by in known else (metric, mode))),
        metric=metric,
        mode=mode,
        size=size or default_size(groups),
        sizes=sizes_in(groups),
        recommendation=recommend(groups, metric, size, tolerance, mode),
        command=None if all(row["status"] == "done" for row in rows) else resume_command(folder),
    )


def report(
    folder: str | Path,
    sort_by: str | None = None,
    *,
    metric: str | None = None,
    mode: str | None = None,
    size: str | None = None,
    tolerance: float = TOLERANCE,
    seeds: Collection[str] = SEEDS,
) -> list[Row]:
    """Write `sweep.csv`, `sweep.png` and `sweep.html` into a sweep's folder, show the table, and return its rows.

    With several seeds, `sweep_means.csv` has a row for each setting. The arguments are those of `summarise`; what
    needs a library that is not installed (the picture: matplotlib) is left out, and said.

    Raises:
        ValueError: there are no jobs in the folder, or no such column.
    """
    summary = summarise(
        folder, sort_by, metric=metric, mode=mode, size=size, tolerance=tolerance, seeds=seeds
    )
    written, notes = write(summary)
    terminal.show(summary, written, notes)
    return list(summary.rows)


def write(summary: Summary) -> tuple[list[Path], list[str]]:
    """Write all files, and return their paths and why others are missing."""
    written = [write_csv(summary.folder / TABLE_FILE, summary.rows)]
    if summary.is_repeated:
        written.append(write_csv(summary.folder / MEANS_FILE, summary.groups))
    notes = [] if summary.metric else [_no_metric(summary.groups)]
    if summary.metric and summary.sizes:
        try:
            written.append(_picture(summary))
        except ImportError as error:
            notes.append(str(error))
    written.append(write_text(summary.folder / PAGE_FILE, to_html(summary)))
    return written, notes


def _no_metric(groups: Sequence[Row]) -> str:
    known = [name for name in numbers_in(groups) if not name.startswith("dense/")]
    return (
        "nothing is recommended: no column is named like an accuracy, a perplexity or a loss of validation. "
        f"Name one with `metric`, of {known}."
    )


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows with all their columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _picture(summary: Summary) -> Path:
    from lightning_prune.sweep.picture import plot_pareto

    assert summary.metric is not None
    chosen = summary.recommendation
    path = summary.folder / PICTURE_FILE
    plot_pareto(
        summary.groups, summary.metric, summary.sizes, chosen.row if chosen else None, path, summary.mode
    )
    return path
