"""Which of many models to take: the Pareto front of quality and size, and one point of it by a rule that is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_prune.core.checks import check_choice
from lightning_prune.core.directions import checked_mode
from lightning_prune.sweep.rows import SIZES, Row, default_metric, numbers_in

TOLERANCE = 0.01


@dataclass(frozen=True)
class Recommendation:
    """One row of a sweep, and why it was chosen.

    Args:
        row: the chosen one, of `group_rows` or `read_jobs`.
        rule: why, in a sentence.
        metric: the column of quality.
        size: the column of size.
        baseline: the quality that it was compared with.
        bound: the quality that it was to reach: the baseline, but for the tolerance.
        is_within: whether it is within the tolerance of that; if not, it is the knee of the front.
    """

    row: Row
    rule: str
    metric: str
    size: str
    baseline: float
    bound: float
    is_within: bool


def default_size(rows: Sequence[Row]) -> str | None:
    """Return the first measure of size that all rows have, and in which they differ: nonzeros, parameters, ..."""
    return next(iter(sizes_in(rows)), None)


def sizes_in(rows: Sequence[Row]) -> list[str]:
    """Return the measures of size that all rows have, and in which they differ; latencies, measurably so."""
    return [size for size in SIZES if _all(rows, size) and _differ(rows, size)]


def pareto_front(rows: Sequence[Row], metric: str, size: str, mode: str | None = None) -> list[Row]:
    """Return the rows that no other beats: none is as small or smaller and better, nor as good or better and smaller.

    Args:
        rows: of `group_rows` or `read_jobs`; those without both columns are left out.
        metric: the column of quality.
        size: the column of size, less is better.
        mode: "min" or "max", what is better of the metric; by default as its name says.

    Returns:
        The front, by growing size; of rows equal in both, the first.

    Raises:
        ValueError: no mode, and a name that does not tell.

    Example:
        >>> rows = [{"acc": 0.9, "params": 9.0}, {"acc": 0.8, "params": 5.0}, {"acc": 0.7, "params": 7.0}]
        >>> [row["params"] for row in pareto_front(rows, "acc", "params")]
        [5.0, 9.0]
    """
    known = [row for row in rows if _is_number(row.get(metric)) and _is_number(row.get(size))]
    front: list[Row] = []
    sign = _sign(metric, mode)
    for row in sorted(known, key=lambda row: (row[size], -sign * row[metric])):
        if not front or sign * row[metric] > sign * front[-1][metric]:
            front.append(row)
    return front


def recommend(
    rows: Sequence[Row],
    metric: str | None = None,
    size: str | None = None,
    tolerance: float = TOLERANCE,
    mode: str | None = None,
) -> Recommendation | None:
    """Choose the smallest model that is as good as the dense one, but for a tolerance; if there is none, the knee.

    The baseline is the dense model of the sweep (sparsity 0), or the one that was pruned after training, or the best
    of all. The knee is the point of the front farthest above the line between its ends, size on a logarithmic scale.

    Args:
        rows: of `group_rows` or `read_jobs`.
        metric: the column of quality; by default of validation, accuracy before perplexity before loss.
        size: the column of size; by default the first of nonzeros, params, num_bytes, ... that differs.
        tolerance: what may be lost: in units of a metric of which more is better, as a fraction of one of which less
            is better; 0 or more.
        mode: "min" or "max", what is better of the metric; by default as its name says.

    Returns:
        The recommendation, or None where no row has both.

    Raises:
        ValueError: a column that is not there, a tolerance below 0, or no mode and a name that does not tell.

    Example:
        >>> rows = [{"acc": 0.95, "params": 9.0, "sparsity": 0.0}, {"acc": 0.949, "params": 5.0, "sparsity": 0.5}]
        >>> recommend([*rows, {"acc": 0.7, "params": 1.0, "sparsity": 0.9}], "acc").row["params"]
        5.0
    """
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` is 0 or more, but got {tolerance}.")
    for name, column in (("metric", metric), ("size", size)):
        if column is not None:
            check_choice(name, column, numbers_in(rows))
    metric, size = metric or default_metric(rows), size or default_size(rows)
    if metric is None or size is None or not (front := pareto_front(rows, metric, size, mode)):
        return None
    mode = checked_mode(metric, mode)
    sign = _sign(metric, mode)
    baseline, whose = _baseline(rows, metric, max if mode == "max" else min)
    bound = baseline - tolerance if mode == "max" else baseline + tolerance * abs(baseline)
    within = [row for row in front if sign * row[metric] >= sign * bound and row.get("sparsity") != 0.0]
    allowed = f"{tolerance:.3g}" if mode == "max" else f"{tolerance:.3g} of it"
    if within:
        rule = f"the smallest by {size} whose {metric} is within {allowed} of {whose}, {baseline:.4g}"
    else:
        rule = (
            f"the knee of the front, since no pruned model's {metric} is within {allowed} of {whose}, "
            f"{baseline:.4g}"
        )
    row = within[0] if within else _knee(front, metric, size, sign)
    return Recommendation(row, rule, metric, size, baseline, bound, bool(within))


def _baseline(
    rows: Sequence[Row], metric: str, best: Callable[[Iterable[float]], float]
) -> tuple[float, str]:
    """Return the quality to compare with, and whose it is."""
    if dense := [row[metric] for row in rows if row.get("sparsity") == 0.0 and _is_number(row.get(metric))]:
        return best(dense), "the dense model's"
    before = [row[f"dense/{metric}"] for row in rows if _is_number(row.get(f"dense/{metric}"))]
    if before:
        return best(before), "that before pruning"
    return best(row[metric] for row in rows if _is_number(row.get(metric))), "the best of the sweep"


def _knee(front: Sequence[Row], metric: str, size: str, sign: int) -> Row:
    """Return the point farthest above the line between the ends; of fewer than three, the best by the metric."""
    if len(front) < 3:
        return front[-1]
    x = [math.log(max(row[size], 1e-12)) for row in front]
    y = [sign * row[metric] for row in front]
    heights = [
        (y[i] - y[0]) / (y[-1] - y[0]) - (x[i] - x[0]) / (x[-1] - x[0] or 1.0) for i in range(len(front))
    ]
    return front[heights.index(max(heights))]


def _sign(metric: str, mode: str | None) -> int:
    return 1 if checked_mode(metric, mode) == "max" else -1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _differ(rows: Sequence[Row], size: str) -> bool:
    """Whether any row differs from any other: for a latency, whether their quartiles lie apart."""
    low, high = ("latency_low_ms", "latency_high_ms") if size == "latency_ms" else (size, size)
    known = [(float(row.get(low) or row[size]), float(row.get(high) or row[size])) for row in rows]
    return bool(known) and max(lowest for lowest, _ in known) > min(highest for _, highest in known)


def _all(rows: Sequence[Row], column: str) -> bool:
    return all(_is_number(row.get(column)) for row in rows)
