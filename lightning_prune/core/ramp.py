"""How far a run has come along its schedule: the part of pruning in time that can be counted without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_prune.core.checks import check_noun, check_range
from lightning_prune.core.types import Schedule
from lightning_prune.core.windows import StepWindow, Window


def check_timing(schedule: Schedule, window: Window) -> None:
    """Refuse what is no curve, or no part of a run.

    Raises:
        ValueError: anything else.
    """
    check_noun("schedule", schedule, "Linear()", "__call__")
    check_noun("window", window, "Window()", "resolve")


@dataclass
class Ramp:
    """A schedule stretched over a window, and the steps that were counted.

    An update falls due on a step and stays due until it is done, so that a step which an optimizer skips, or a
    criterion that still waits for gradients, delays an update and never drops it.

    Args:
        schedule: progress -> fraction of the target.
        steps: the window.
        num_steps: steps done.
        is_due: whether an update waits.

    Example:
        >>> from lightning_prune import Linear
        >>> ramp = Ramp(Linear(), StepWindow(start=1, end=3, every=2))
        >>> ramp.tick(); (ramp.is_due, ramp.fraction)
        (True, 0.0)
        >>> ramp.is_due = False; ramp.tick(); (ramp.is_due, ramp.is_near, ramp.fraction)
        (False, True, 0.5)
    """

    schedule: Schedule
    steps: StepWindow
    num_steps: int = 0
    is_due: bool = False

    def __post_init__(self) -> None:
        self.is_due = self.is_due or self.steps.fires(self.num_steps)

    def tick(self) -> None:
        """Count a step."""
        self.num_steps += 1
        self.is_due = self.is_due or self.steps.fires(self.num_steps)

    @property
    def is_near(self) -> bool:
        """Whether an update waits or falls due on the next step."""
        return self.is_due or self.steps.fires(self.num_steps + 1)

    @property
    def is_over(self) -> bool:
        """Whether the last update is done."""
        return self.num_steps >= self.steps.end and not self.is_due

    @property
    def progress(self) -> float:
        """How much of the window lies behind, in [0, 1]."""
        return self.steps.progress(self.num_steps)

    @property
    def fraction(self) -> float:
        """The fraction of the target that the schedule asks for now.

        Raises:
            ValueError: a schedule that leaves [0, 1].
        """
        what = f"a curve in [0, 1], at progress {self.progress:.4g} too"
        return check_range("schedule", self.schedule(self.progress), 0.0, 1.0, what)

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted, and the window if it is over."""
        ended = [self.steps.start, self.steps.end, self.steps.every] if self.is_over else None
        return {"num_steps": self.num_steps, "is_due": self.is_due, "ended": ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was counted."""
        self.num_steps, self.is_due = int(state["num_steps"]), bool(state["is_due"])
