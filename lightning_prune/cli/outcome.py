"""The numbers that a run ends in: gathered, chosen among, written and shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hydra.core.hydra_config import HydraConfig

from lightning_prune.core.checks import check_choice
from lightning_prune.report.numbers import NAMES, numbers_of
from lightning_prune.report.storage import write_text
from lightning_prune.sweep.notes import METRICS_FILE

if TYPE_CHECKING:
    import lightning as L

Metrics: TypeAlias = dict[str, float]


def as_numbers(metrics: Mapping[str, Any]) -> Metrics:
    """Return logged scalars as plain numbers."""
    return {name: float(value) for name, value in metrics.items()}


def chosen(metrics: Metrics, names: str | Iterable[str] | None) -> float | tuple[float, ...] | Metrics:
    """Pick what a sweep optimizes: one number, several, or with no name given all of them.

    Example:
        >>> chosen({"val/acc": 0.9, "sparsity": 0.5}, ["val/acc", "sparsity"])
        (0.9, 0.5)
    """
    if names is None:
        return metrics
    single = isinstance(names, str)
    values = tuple(
        metrics[check_choice("optimized_metric", n, metrics)] for n in ([names] if single else names)
    )
    return values[0] if single else values


def check_can_choose(names: str | Iterable[str] | None, logged: set[str] | None) -> None:
    """Refuse before the run what could not be chosen after it, as far as it is known what a module logs."""
    for name in ([names] if isinstance(names, str) else names) or ():
        if logged and (name.startswith(("train/", "val/", "test/")) or "/" not in name):
            check_choice("optimized_metric", name, [*sorted(logged), *NAMES])


def reported(trainer: L.Trainer) -> Metrics:
    """What the report knows of the run: the metrics of the pruned model and its size."""
    from lightning_prune import SparsityMonitor

    monitors = [cb for cb in trainer.callbacks if isinstance(cb, SparsityMonitor)]  # type: ignore[attr-defined]
    report = monitors[0].report if monitors else None
    return {} if report is None else numbers_of(report)


def levels_of(trainer: L.Trainer) -> Metrics:
    """What each level of a run that rewinds has come to: "level2/val/acc"."""
    from lightning_prune import WeightRewinding

    callbacks = [cb for cb in trainer.callbacks if isinstance(cb, WeightRewinding)]  # type: ignore[attr-defined]
    levels = [found for callback in callbacks for found in callback.levels]
    return {f"level{f['level']:.0f}/{name}": v for f in levels for name, v in f.items() if name != "level"}


def write(metrics: Metrics) -> None:
    """Write the metrics into Hydra's run folder, where a sweep finds them, and show them."""
    show(metrics, "metrics")
    if HydraConfig.initialized():
        folder = Path(HydraConfig.get().runtime.output_dir)
        write_text(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
        sys.stdout.write(f"run folder: {folder}\n")


def show(numbers: Mapping[str, float], title: str) -> None:
    """Print numbers as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title, "")
    for name, value in sorted(numbers.items()):
        table.add_row(name, f"{value:.4f}" if value % 1 else f"{value:.0f}")
    Console().print(table)
