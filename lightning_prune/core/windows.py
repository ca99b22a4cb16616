"""When: which steps of a run update the masks, and how far through the ramp each of them is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_prune.core.checks import check_choice, check_number, check_range

UNITS = ("run", "epochs", "steps")


@dataclass(frozen=True)
class Window:
    """The part of a run in which masks are updated, as the user writes it.

    Cost: (`end` - `start`) / `every` updates, each with a selection and what the criterion computes then.

    When: masks change in training; leave the last third of the run for the network to recover.

    Args:
        start: where the ramp begins; 0 is before the first optimizer step.
        end: where it ends. The last update lands exactly here, whatever `every` is.
        every: the distance between updates, above 0; less than one step means every step.
        unit: what the three are counted in. "run": fractions of the whole run, in [0, 1]; "epochs": training
            epochs, 0.5 is half of one; "steps": optimizer steps (training batches on which one was taken).

    Raises:
        ValueError: an end before the start, a fraction outside of [0, 1], or an unknown unit.

    Example:
        >>> Window(start=0.0, end=0.5, every=0.1).resolve(num_steps=100, steps_per_epoch=10)
        StepWindow(start=0, end=50, every=10)
    """

    start: float = 0.0
    end: float = 0.7
    every: float = 0.01
    unit: str = "run"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS)
        start, end, every = (check_number(n, getattr(self, n)) for n in ("start", "end", "every"))
        if self.unit == "run":
            what = "a fraction of the run in [0, 1], or a number of steps or epochs with `unit`"
            check_range("start", start, 0.0, 1.0, what), check_range("end", end, 0.0, 1.0, what)
        if not 0.0 <= start <= end:
            raise ValueError(
                f"`end` is not before `start`, which is at least 0, but got {self.start!r} to {self.end!r}."
            )
        if every <= 0.0:
            raise ValueError(f"`every` is a number above 0, but got {self.every!r}.")
        if self.unit == "steps" and not (start.is_integer() and end.is_integer() and every.is_integer()):
            raise ValueError(f"`start`, `end` and `every` are whole numbers of steps, but got {self}.")

    def resolve(self, num_steps: float, steps_per_epoch: float) -> StepWindow:
        """Count the window in optimizer steps.

        Args:
            num_steps: length of the run in optimizer steps; infinite or below 1 where the trainer cannot tell.
            steps_per_epoch: optimizer steps of one epoch; infinite where the trainer cannot tell.

        Raises:
            ValueError: the unit needs a length that is unknown, or the window ends after the run.
        """
        unit = {"run": num_steps, "epochs": steps_per_epoch, "steps": 1.0}[self.unit]
        if not (math.isfinite(unit) and unit >= 1):
            raise ValueError(
                f"`window` is counted in {'fractions of the run' if self.unit == 'run' else 'epochs'}, whose length in "
                "optimizer steps cannot be told here (only `max_time`, or a data set of unknown length): set "
                "`max_steps` or `max_epochs` on the Trainer, or give the window in steps: "
                "Window(start=..., end=..., every=..., unit='steps')."
            )
        # round, not floor: 0.7 * 10 is 7.000000000000001 or 6.999999999999999 at will
        start, end = round(self.start * unit), round(self.end * unit)
        if math.isfinite(num_steps) and num_steps >= 1 and end > num_steps:
            raise ValueError(
                f"`window` ends at optimizer step {end}, but the run has {int(num_steps)} steps: the target would "
                f"never be reached. Got {self}."
            )
        return StepWindow(start, end, max(1, round(self.every * unit)))


@dataclass(frozen=True)
class StepWindow:
    """A window in optimizer steps: whole numbers, `start` <= `end`, `every` >= 1.

    Example:
        >>> window = StepWindow(start=10, end=25, every=10)
        >>> [step for step in range(40) if window.fires(step)]
        [10, 20, 25]
        >>> window.progress(20)
        0.6666666666666666
    """

    start: int
    end: int
    every: int

    def fires(self, step: int) -> bool:
        """Whether the masks are updated once `step` optimizer steps are done."""
        return self.start <= step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)

    def progress(self, step: int) -> float:
        """How much of the ramp lies behind: 0 at `start` and before, 1 at `end` and after."""
        if step >= self.end:
            return 1.0
        return 0.0 if step <= self.start else (step - self.start) / (self.end - self.start)

    def begun_at(self, step: int) -> StepWindow:
        """Return the window of a run that has done `step` steps without pruning: what lies behind is left out.

        Raises:
            ValueError: all of it lies behind.
        """
        if step > self.end:
            raise ValueError(
                f"`window` ends after pruning begins, but got an end at optimizer step {self.end} of a run that has "
                f"done {step}: give a later end, or more epochs."
            )
        return StepWindow(max(self.start, step), self.end, self.every)
