"""A report as one row of numbers by name, as sweeps compare them."""

from __future__ import annotations

from lightning_prune.report.costs import Cost
from lightning_prune.report.data import Report

SIZES_OF_COST = ("params", "nonzeros", "macs", "effective_macs", "num_bytes", "gzip_bytes")
NAMES = ("sparsity", *SIZES_OF_COST, "latency_ms", "latency_low_ms", "latency_high_ms")
"""What is there beside the metrics that a module logs, and what begins with "dense/"."""


def numbers_of(report: Report) -> dict[str, float]:
    """Return the metrics of the pruned model and what it costs; of the dense one as "dense/...".

    Example:
        >>> numbers_of(Report("train_time", achieved_sparsity=0.5, metrics_after={"val/acc": 0.9}))
        {'sparsity': 0.5, 'val/acc': 0.9}
    """
    known = {"sparsity": report.achieved_sparsity or 0.0, **_sizes(report.cost_after), **report.metrics_after}
    known |= {f"dense/{name}": value for name, value in _sizes(report.cost_before).items()}
    if report.kind == "post_training":  # elsewhere the dense model was still in training
        known |= {f"dense/{name}": value for name, value in report.metrics_before.items()}
    return {name: float(value) for name, value in known.items() if value is not None}


def _sizes(cost: Cost | None) -> dict[str, float | None]:
    """What a model costs, as far as it was measured; of its latency the median and the quartiles."""
    if cost is None:
        return {}
    sizes = {name: getattr(cost, name) for name in SIZES_OF_COST}
    if (latency := cost.latency) is not None:
        sizes |= {"latency_ms": latency.median_ms}
        sizes |= {"latency_low_ms": latency.low_ms, "latency_high_ms": latency.high_ms}
    return sizes
