"""The picture of a sweep. It needs matplotlib: `pip install "lightning-prune[sweeps]"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.plots import new_figure, save
from lightning_prune.sweep.choice import pareto_front

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_pareto(
    rows: Sequence[dict[str, Any]],
    metric: str,
    sizes: Sequence[str],
    chosen: Mapping[str, Any] | None = None,
    path: str | Path | None = None,
    mode: str | None = None,
) -> Figure:
    """Draw models by quality and size: a picture for each measure of size, with the front of those that no other beats.

    Args:
        rows: one for each model, as `lightning_prune.sweep.group_rows` returns them; "<column> sd" is drawn as a bar.
        metric: the column of quality.
        sizes: the columns of size, at least one.
        chosen: the row to point out.
        path: where to save the picture, as for `plot_schedule`.
        mode: "min" or "max", what is better of the metric; by default as its name says.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no mode, and a name that does not tell.

    Example:
        >>> rows = [{"acc": 0.9, "params": 9.0}, {"acc": 0.8, "params": 5.0}, {"acc": 0.7, "params": 7.0}]
        >>> figure = plot_pareto(rows, "acc", ["params"])
        >>> figure.axes[0].lines[0].get_xdata().tolist()  # the front
        [5.0, 9.0]
    """
    figure = new_figure(width=max(6.0, 3.8 * len(sizes)), height=4.0)
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    all_axes = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axes, size in zip(all_axes, sizes, strict=True):
        front = pareto_front(rows, metric, size, mode)
        axes.plot(
            [r[size] for r in front],
            [r[metric] for r in front],
            "o-",
            color="C0",
            ms=5,
            label="front",
        )
        for row in rows:
            if metric in row and size in row:
                bars = {"xerr": row.get(f"{size} sd"), "yerr": row.get(f"{metric} sd")}
                axes.errorbar(row[size], row[metric], fmt=".", color="0.45", elinewidth=0.8, zorder=1, **bars)
        if chosen is not None and size in chosen:
            axes.plot(chosen[size], chosen[metric], "*", color="C3", ms=14, label="recommended")
        values = [row[size] for row in rows if size in row]
        if min(values) > 0 and max(values) > 5 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(size)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(metric)
    all_axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)
    return figure
