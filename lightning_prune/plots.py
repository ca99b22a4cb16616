"""Pictures of ramps and of what layers bear. They need matplotlib: `pip install "lightning-prune[plots]"`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from lightning_prune.core.types import Name, Schedule
from lightning_prune.core.windows import StepWindow, Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_POINTS = 501
STEPS_OF = {"run": 10_000, "epochs": 10_000, "steps": 1}  # how finely a window is drawn: steps of one unit
LINES = ("-", "--", "-.", ":")
AXES = {"run": "fraction of the run", "epochs": "epochs", "steps": "optimizer steps"}


def plot_schedule(
    schedule: Schedule, window: Window | StepWindow | None = None, path: str | Path | None = None
) -> Figure:
    """Draw a schedule, and the updates of the masks where a window is given.

    Args:
        schedule: progress -> fraction of the target, both in [0, 1].
        window: when masks are updated; without one, the curve is drawn over its progress.
        path: where to save the picture; its suffix says the format (png, svg, pdf). The folder is created.

    Returns:
        The matplotlib figure; it belongs to no window and needs no display.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> from lightning_prune import Polynomial, Window
        >>> figure = plot_schedule(Polynomial(), Window(end=0.7, every=0.1))
        >>> len(figure.axes[0].lines[1].get_xdata())  # one point for each update
        8
    """
    figure = new_figure()
    axes = figure.subplots()
    steps, scale, label = _resolved(window)
    edges = [steps.start, steps.end]
    curve = [edges[0] + (edges[1] - edges[0]) * i / (NUM_POINTS - 1) for i in range(NUM_POINTS)]
    values = [schedule(i / (NUM_POINTS - 1)) for i in range(NUM_POINTS)]
    if isinstance(window, Window) and window.unit == "run":
        curve, values = [*curve, scale], [*values, values[-1]]  # what is reached is kept until the run ends
    axes.plot([step / scale for step in curve], values, color="C0", linewidth=1.5)
    if window is not None:
        fired = [step for step in range(steps.start, steps.end + 1) if steps.fires(step)]
        points = [schedule(steps.progress(step)) for step in fired]
        axes.plot([step / scale for step in fired], points, "o", color="C1", markersize=3.5, label="updates")
        axes.legend(loc="lower right", frameon=False)
    axes.set(
        xlabel=label,
        ylabel="fraction of the target sparsity",
        title=fill(str(schedule), 60),
        ylim=(-0.04, 1.04),
    )
    axes.grid(alpha=0.3)
    save(figure, path)
    return figure


def plot_sensitivity(
    curves: Mapping[Name, Mapping[float, float]], metric: str, path: str | Path | None = None
) -> Figure:
    """Draw what a metric becomes when one layer is pruned, a line for each layer.

    Args:
        curves: name -> sparsity -> value, as `sensitivity` returns them; sparsity 0 is the dense model.
        metric: its name, for the axis.
        path: where to save the picture, as for `plot_schedule`.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> figure = plot_sensitivity({"a": {0.0: 0.9, 0.5: 0.8}, "b": {0.0: 0.9, 0.5: 0.9}}, "val/acc")
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['dense', 'a', 'b']
    """
    figure = new_figure(height=max(3.6, 0.9 + 0.16 * len(curves)))
    axes = figure.subplots()
    dense = next((curve[0.0] for curve in curves.values() if 0.0 in curve), None)
    if dense is not None:
        axes.axhline(dense, color="0.6", linestyle=":", linewidth=1.0, label="dense")
    for at, (name, curve) in enumerate(curves.items()):
        points = sorted(curve.items())
        style = LINES[at // 10 % len(LINES)]  # the colours repeat after ten
        axes.plot(*zip(*points, strict=True), style, marker=".", linewidth=1.2, label=name)
    axes.set(xlabel="sparsity of the layer", ylabel=metric)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    save(figure, path)
    return figure


def save(figure: Figure, path: str | Path | None) -> None:
    """Save a picture, if it is to be; the folder is created."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def new_figure(height: float = 3.6, width: float = 6.0) -> Figure:
    """Return a figure that belongs to no window, its sides in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib, which is missing: pip install "lightning-prune[plots]".'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _resolved(window: Window | StepWindow | None) -> tuple[StepWindow, float, str]:
    """Return the window in steps, how many of them make one unit of the x-axis, and the name of the axis."""
    if window is None:
        return StepWindow(0, NUM_POINTS, 1), NUM_POINTS, "progress"
    if isinstance(window, StepWindow):
        return window, 1.0, AXES["steps"]
    scale = STEPS_OF[window.unit]
    num_steps = scale if window.unit == "run" else math.inf
    return window.resolve(num_steps=num_steps, steps_per_epoch=scale), scale, AXES[window.unit]
