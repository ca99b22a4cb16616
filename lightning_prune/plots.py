"""Pictures of what will happen. They need matplotlib: `pip install "lightning-prune[plots]"`."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from lightning_prune.core.types import Schedule
from lightning_prune.core.windows import StepWindow, Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_POINTS = 501
STEPS_OF = {"run": 10_000, "epochs": 10_000, "steps": 1}  # how finely a window is drawn: steps of one unit
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
    figure = _new_figure()
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
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib, which is missing: pip install "lightning-prune[plots]".'
        ) from error
    return Figure(figsize=(6.0, 3.6), layout="constrained")


def _resolved(window: Window | StepWindow | None) -> tuple[StepWindow, float, str]:
    """Return the window in steps, how many of them make one unit of the x-axis, and the name of the axis."""
    if window is None:
        return StepWindow(0, NUM_POINTS, 1), NUM_POINTS, "progress"
    if isinstance(window, StepWindow):
        return window, 1.0, AXES["steps"]
    scale = STEPS_OF[window.unit]
    num_steps = scale if window.unit == "run" else math.inf
    return window.resolve(num_steps=num_steps, steps_per_epoch=scale), scale, AXES[window.unit]
