"""A row for each job of a sweep, and one for each setting over its seeds."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

from lightning_prune.core.directions import direction, words_of
from lightning_prune.report.invocation import redacted_setting
from lightning_prune.sweep.notes import (
    ERROR_FILE,
    METRICS_FILE,
    OF_THE_SWEEP,
    SWEEP_FILE,
    natural,
    overrides_in,
    read_note,
    status_of,
)

Row: TypeAlias = dict[str, Any]
PARTS = (("val", "valid", "validation"), ("test",))
KINDS = (("acc", "accuracy"), ("perplexity", "ppl"), ("loss",))
SIZES = ("nonzeros", "params", "num_bytes", "macs", "latency_ms")
SEEDS = ("seed",)
OF_A_JOB = ("job", "status", "error")


def is_lower_better(metric: str, mode: str | None = None) -> bool:
    """Return whether less of a column is better: of a loss, and of all that a model costs.

    Args:
        metric: the column.
        mode: "min" or "max", where that is known; by default the words of its name say it, as far as they can.

    Example:
        >>> is_lower_better("val_mse"), is_lower_better("val/acc"), is_lower_better("latency_ms")
        (True, False, True)
    """
    return (mode or direction(metric)) == "min"


def read_jobs(folder: str | Path) -> list[Row]:
    """Read a row for each job: its folder's name, overrides, metrics, status and error, in the order of the jobs.

    The status is "done", "failed", "running", "stopped" (killed, or interrupted), "missing" (not started yet) or
    "unfinished" (not done, and nobody knows who runs it).

    Raises:
        ValueError: there are no jobs in the folder.
    """
    folder = Path(folder)
    notes = {note.parent.parent: note for note in folder.glob("**/.hydra/overrides.yaml")}
    started = {str(job.relative_to(folder)) if job != folder else job.name: job for job in notes}
    rows = [_read_job(name, job, overrides_in(notes[job])) for name, job in started.items()]
    planned = read_note(folder / SWEEP_FILE).get("jobs", {})
    rows += [
        {"job": name, **_as_columns(overrides), "status": "missing"}
        for name, overrides in planned.items()
        if name not in started
    ]
    if not rows:
        raise ValueError(
            f"`folder` is one of a Hydra multirun, but got {str(folder)!r}, which holds no jobs."
        )
    return sorted(rows, key=lambda row: natural(str(row["job"])))


def group_rows(rows: Iterable[Row], seeds: Collection[str] = SEEDS) -> list[Row]:
    """Put the finished jobs together that differ in their seeds alone.

    Args:
        rows: of `read_jobs`.
        seeds: names of the overrides that are no settings but repetitions.

    Returns:
        A row for each setting: its overrides, "jobs" (their names), "num_jobs", and for each number its mean and, of
        several jobs, its standard deviation as "<column> sd" (of the sample: divided by n - 1).

    Example:
        >>> accuracies = {"0": 0.5, "1": 1.0}
        >>> jobs = [{"job": n, "seed": n, "val/acc": acc, "status": "done"} for n, acc in accuracies.items()]
        >>> group_rows(jobs)  # doctest: +ELLIPSIS
        [{'jobs': '0 1', 'num_jobs': 2, 'val/acc': 0.75, 'val/acc sd': 0.3535...}]
    """
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "done":
            settings = {name: value for name, value in settings_in(row).items() if name not in seeds}
            groups.setdefault(tuple(sorted(settings.items())), []).append(row)
    return [_summed_up(members, seeds) for members in groups.values()]


def settings_in(row: Row) -> Row:
    """Return the overrides among the columns of a row: those that are text."""
    return {n: v for n, v in row.items() if isinstance(v, str) and n not in (*OF_A_JOB, "jobs")}


def numbers_in(rows: Iterable[Row]) -> list[str]:
    """Return the columns that hold numbers, in their order."""
    return list(
        dict.fromkeys(
            n for row in rows for n, v in row.items() if isinstance(v, float) and not n.endswith(" sd")
        )
    )


def differing(rows: Sequence[Row]) -> list[str]:
    """Return the settings in which the rows differ, in their order."""
    names = dict.fromkeys(name for row in rows for name in settings_in(row))
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def default_metric(rows: Sequence[Row]) -> str | None:
    """Return the first of accuracy, perplexity and loss that is there, of validation rather than of test data.

    Example:
        >>> default_metric([{"train_acc": 1.0, "test_acc": 0.9, "val_loss": 0.3}])
        'test_acc'
    """
    known = {n: words_of(n) for n in numbers_in(rows) if not n.startswith("dense/")}
    ranked = (
        name
        for kind in KINDS
        for part in PARTS
        for name, words in known.items()
        if words and words[0] in part and words[-1] in kind
    )
    return next(ranked, None)


def sorted_rows(rows: Sequence[Row], sort_by: str | None = None, mode: str | None = None) -> list[Row]:
    """Sort by a column, best first, jobs without it last and all else in the order of the jobs.

    Args:
        rows: of `read_jobs` or `group_rows`.
        sort_by: a column; by default the metric that `default_metric` finds.
        mode: "min" or "max", what is better of it; by default as its name says, and else more.

    Raises:
        ValueError: there is no such column.
    """
    known = {column for row in rows for column in row}
    if sort_by is not None and sort_by not in known:
        raise ValueError(f"`sort_by` is one of {sorted(known)}, but got {sort_by!r}.")
    column = sort_by or default_metric(rows)
    if column is None:
        return list(rows)
    sign = 1 if is_lower_better(column, mode) else -1

    def key(row: Row) -> tuple[bool, float, str]:
        value = row.get(column)
        if isinstance(value, (int, float)):
            return (value != value, sign * value, "")  # what is no number comes last
        return (value is None, 0.0, str(value))

    return sorted(rows, key=key)


def _read_job(name: str, folder: Path, overrides: Sequence[str]) -> Row:
    row: Row = {"job": name, **_as_columns(overrides)}
    status = status_of(folder)
    if status == "done":
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        row |= {name: float(value) for name, value in metrics.items()}
    if status == "failed":
        return {**row, "status": status, "error": (folder / ERROR_FILE).read_text(encoding="utf-8").strip()}
    return {**row, "status": status}


def _as_columns(overrides: Iterable[str]) -> dict[str, str]:
    shown = (redacted_setting(o.lstrip("+~")) for o in overrides if not o.startswith(OF_THE_SWEEP))
    parts = (override.partition("=") for override in shown)
    return {name: value for name, _, value in parts}


def _summed_up(members: Sequence[Row], seeds: Collection[str]) -> Row:
    settings = {name: value for name, value in settings_in(members[0]).items() if name not in seeds}
    group: Row = {**settings, "jobs": " ".join(str(row["job"]) for row in members), "num_jobs": len(members)}
    for column in numbers_in(members):
        values = [row[column] for row in members if column in row]
        group[column] = fmean(values)
        if len(values) > 1:
            group[f"{column} sd"] = stdev(values)
    return group
