"""The tables of the accuracy benchmark: methods by sparsity, which orders are expected, and where they stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.accuracy_others import OTHERS
from benchmarks.record import table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- accuracy tables: python -m benchmarks.accuracy --readme -->", "<!-- end of them -->"
MODEL_PRUNING = "Lightning's ModelPruning"
AT_RANDOM = "one_shot at random"
GRADUAL = "global_unstructured"
EXPECTED = (
    (GRADUAL, "one_shot"),
    (GRADUAL, "random"),
    ("one_shot", AT_RANDOM),
    ("rigl", "set"),
    ("rigl_mean", "set"),
    ("set", "static"),
    (GRADUAL, MODEL_PRUNING),
)
"""Pairs of which the first is expected to be at least as good as the second."""
PUBLISHED = {
    ("mlp-mnist", 0.9): "98.55 sparse momentum (92 %), 98.4 Han 2015 (91.7 %)",
    ("mlp-mnist", 0.95): "98.47 sparse momentum, 98.4 SNIP",
    (
        "mlp-mnist",
        0.98,
    ): "98.01 sparse momentum, 97.6 SNIP, 98.0 DNS, 98.1 Sparse VD, 97.69 trainable thresholds",
    ("mlp-mnist", 0.99): "97.64 sparse momentum",
    ("lenet5-mnist", 0.9): "99.36 sparse momentum (90.7 %)",
    ("lenet5-mnist", 0.95): "99.31 sparse momentum",
    ("lenet5-mnist", 0.98): "99.24 sparse momentum",
    ("lenet5-mnist", 0.99): "99.17 sparse momentum, 99.1 DNS (99.1 %), 99.2 Sparse VD (99.6 %)",
}
"""Figures of other authors for the same network and all of the data, their training budgets being their own."""

Rows = Sequence[Mapping[str, Any]]


def summary(setting: str, rows: Rows, metric: str = "test/acc") -> str:
    """Return a setting's table: mean and standard deviation over the seeds, the best at high sparsity first.

    Args:
        setting: its name.
        rows: results, one for each run.
        metric: an accuracy in percent, or a perplexity, of which less is better.
    """
    others = beside(rows, metric)
    rows = [row for row in rows if row["method"] not in OTHERS]
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"]})
    lines, ranks = [], {}
    for method in dict.fromkeys(row["method"] for row in rows if row["sparsity"]):
        found = {s: _values(rows, metric, method, s) for s in sparsities}
        lines.append({"method": method} | {f"{s:.0%}": _cell(at) for s, at in found.items()})
        ranks[method] = _rank(found, metric)
    lines.sort(key=lambda line: ranks[line["method"]])
    told = {f"{s:.0%}": PUBLISHED.get((setting.removesuffix("-subset"), s), "–") for s in sparsities}
    name = "published, trained on all images" if setting.endswith("-subset") else "published"
    lines += [{"method": name} | told] if set(told.values()) != {"–"} else []
    head = f"{setting}, {metric}, dense {_cell(_values(rows, metric, 'dense', 0.0))}"
    parts = head, table(lines) if lines else "", orders(rows, metric), others
    return "\n\n".join(part for part in parts if part)


def beside(rows: Rows, metric: str) -> str:
    """Return what was done beside the grid of sparsities, the best first.

    Example:
        >>> rows = [{"method": m, "sparsity": 0.5, "test/acc": v} for m, v in (("n_of_m", 98.0), ("sr_ste", 98.25))]
        >>> beside(rows, "test/acc")
        '- 2 of each 4 weights: `sr_ste` 98.25, `n_of_m` 98.00'
    """
    found = {m: _values(rows, metric, m, 0.5) for m in OTHERS}
    ranked = sorted((m for m in found if found[m]), key=lambda m: _rank({0.5: found[m]}, metric))
    lines: dict[str, list[str]] = {}
    for method in ranked:
        lines.setdefault(OTHERS[method][0], []).append(f"`{method}` {_cell(found[method])}")
    return "\n".join(f"- {what}: {', '.join(cells)}" for what, cells in lines.items())


def _rank(found: Mapping[float, Sequence[float]], metric: str) -> tuple[int, float]:
    """Rank methods that were run at the same sparsities by their mean; those that were run at more come first."""
    means = [mean(at) for at in found.values() if at]
    return -len(means), mean(means) * (-1 if is_more_better(metric) else 1)


def is_more_better(metric: str) -> bool:
    """Whether a metric is an accuracy, and no perplexity."""
    return metric.endswith("acc")


def orders(rows: Rows, metric: str) -> str:
    """Return for each expected pair how much better the first is, and whether that is more than noise.

    The difference of the means is compared with twice its standard error; a single seed tells no noise.

    Example:
        >>> cells = [("rigl", 98.0), ("rigl", 98.2), ("set", 97.0), ("set", 97.2)]
        >>> rows = [{"method": m, "sparsity": 0.9, "test/acc": value} for m, value in cells]
        >>> orders(rows, "test/acc")
        '- `rigl` ≥ `set`: 90% +1.00 ± 0.14 holds'
    """
    lines = []
    for better, worse in EXPECTED:
        cells = []
        for sparsity in sorted({row["sparsity"] for row in rows if row["sparsity"]}):
            first, second = (_values(rows, metric, method, sparsity) for method in (better, worse))
            if first and second:
                cells.append(f"{sparsity:.0%} {_difference(first, second, is_more_better(metric))}")
        lines += [f"- `{better}` ≥ `{worse}`: {', '.join(cells)}"] if cells else []
    return "\n".join(lines)


def _difference(first: Sequence[float], second: Sequence[float], is_more_good: bool) -> str:
    ahead = (mean(first) - mean(second)) * (1 if is_more_good else -1)
    if min(len(first), len(second)) < 2:
        return f"{ahead:+.2f} (one seed)"
    error = math.hypot(*(stdev(at) / math.sqrt(len(at)) for at in (first, second)))
    verdict = "level" if abs(ahead) < 2 * error else "holds" if ahead > 0 else "**does not hold**"
    return f"{ahead:+.2f} ± {error:.2f} {verdict}"


def _values(rows: Rows, metric: str, method: str, sparsity: float) -> list[float]:
    return [row[metric] for row in rows if (row["method"], row["sparsity"]) == (method, sparsity)]


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" if values else "–"


def placed(text: str, tables: Sequence[str]) -> str:
    """Return a page with the tables between its two markers, in place of what was there."""
    before, rest = text.split(BEGIN)
    return "\n\n".join([before + BEGIN, *(f"#### {told}" for told in tables), END + rest.split(END)[1]])
