"""One table of results for a whole sweep: `python -m lightning_prune.sweep multirun/...`, and by itself at its end."""

from __future__ import annotations

import argparse
import atexit
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

Row: TypeAlias = dict[str, Any]
TABLE_FILE, METRICS_FILE, ERROR_FILE = "results.csv", "metrics.json", "error.txt"
PREFERRED = ("test/acc", "val/acc", "test/perplexity", "val/perplexity", "test/loss", "val/loss")
METRICS_SHOWN = ("sparsity", "val/", "test/")
LOWER_IS_BETTER = ("loss", "perplexity", "error")


def is_lower_better(metric: str) -> bool:
    """Return whether a metric's name is one of a loss.

    Example:
        >>> is_lower_better("val/loss"), is_lower_better("val/acc")
        (True, False)
    """
    return metric.endswith(LOWER_IS_BETTER)


class SweepTable(Callback):
    """Hydra callback that shows a table of all jobs when a multirun ends, also when some of them failed.

    Args:
        sort_by: the column to sort by, best first; by default the first of accuracy, perplexity and loss that is there.
    """

    def __init__(self, sort_by: str | None = None) -> None:
        self.sort_by = sort_by
        self._waiting: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make sure of a table: Hydra calls `on_multirun_end` only if no job fails."""
        if _is_first_process():
            self._waiting = Path(config.hydra.sweep.dir)
            atexit.register(self._report)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Leave a note of what went wrong in the job's folder."""
        if _is_first_process() and job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            path = Path(config.hydra.runtime.output_dir) / ERROR_FILE
            path.write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and show the table."""
        self._report()

    def _report(self) -> None:
        folder, self._waiting = self._waiting, None
        if folder is not None and folder.is_dir():
            report(folder, self.sort_by)


def report(folder: str | Path, sort_by: str | None = None) -> list[Row]:
    """Write `results.csv` into a sweep's folder, show it, and return its rows.

    Args:
        folder: of a Hydra multirun.
        sort_by: a column, best first; by default the first of accuracy, perplexity and loss that is there.

    Raises:
        ValueError: there are no jobs in the folder, or no such column.
    """
    rows = _sorted(read_jobs(folder), sort_by)
    path = Path(folder) / TABLE_FILE
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    _show(rows, columns, path)
    return rows


def read_jobs(folder: str | Path) -> list[Row]:
    """Read a row for each job: its number, overrides, metrics, status ("done", "failed", "unfinished") and error.

    Raises:
        ValueError: there are no jobs in the folder.
    """
    notes = sorted(
        Path(folder).glob("**/.hydra/overrides.yaml"), key=lambda path: _natural(path.parent.parent.name)
    )
    if not notes:
        raise ValueError(
            f"`folder` is one of a Hydra multirun, but got {str(folder)!r}, which holds no jobs."
        )
    return [_read_job(note.parent.parent, note) for note in notes]


def _read_job(folder: Path, note: Path) -> Row:
    overrides = [
        str(o).lstrip("+~").partition("=") for o in OmegaConf.to_container(OmegaConf.load(note)) or []
    ]
    row: Row = {"job": folder.name, **{name: value for name, _, value in overrides}}
    if (metrics := folder / METRICS_FILE).is_file():
        return {**row, **json.loads(metrics.read_text(encoding="utf-8")), "status": "done"}
    if (error := folder / ERROR_FILE).is_file():
        return {**row, "status": "failed", "error": error.read_text(encoding="utf-8").strip()}
    return {**row, "status": "unfinished"}


def _sorted(rows: list[Row], sort_by: str | None) -> list[Row]:
    """Sort by a metric, best first, jobs without it last and all else in the order of the jobs."""
    known = {column for row in rows for column in row}
    if sort_by is not None and sort_by not in known:
        raise ValueError(f"`sort_by` is one of {sorted(known)}, but got {sort_by!r}.")
    column = sort_by or next((name for name in PREFERRED if name in known), None)
    if column is None:
        return rows
    sign = 1 if is_lower_better(column) else -1

    def key(row: Row) -> tuple[bool, float, str]:
        value = row.get(column)
        if isinstance(value, (int, float)):
            return (False, sign * value, "")
        return (value is None, 0.0, str(value))

    return sorted(rows, key=key)


def _show(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Print the settings in which the jobs differ, the metrics that matter, and what went wrong."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    shown = _shown(rows, columns)
    for column in shown:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(column, "")) for column in shown))
    console = Console()
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"job {row['job']} failed: {row['error']}", markup=False, soft_wrap=True)
    console.print(f"all columns: {path}", soft_wrap=True)


def _shown(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    metrics = [
        c
        for c in columns
        if c.startswith(METRICS_SHOWN) and any(isinstance(row.get(c), float) for row in rows)
    ]
    metrics = [c for c in metrics if not c.endswith("loss")] or metrics
    numbers = {c for c in columns if any(isinstance(row.get(c), float) for row in rows)}
    settings = [c for c in columns if c not in {*numbers, "job", "status", "error"}]
    differing = [c for c in settings if len({str(row.get(c)) for row in rows}) > 1]
    return ["job", *differing, *metrics, "status"]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value % 1 else f"{value:.0f}"
    return str(value).replace("[", "\\[")


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort numbers as numbers, and behind them what is none."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def _is_first_process() -> bool:
    """Whether this process reports: under DDP each of them runs Hydra."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on a sweep's folder from the command line."""
    parser = argparse.ArgumentParser(prog="python -m lightning_prune.sweep", description=main.__doc__)
    parser.add_argument("folder", help="of a Hydra multirun, e.g. multirun/2026-01-31/12-00-00")
    parser.add_argument("--sort-by", help="a column, best first")
    options = parser.parse_args(arguments)
    try:
        report(options.folder, options.sort_by)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
