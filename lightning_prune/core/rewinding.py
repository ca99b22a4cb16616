"""What is pruned between trainings, and what goes back before the next one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning_prune.core.checks import check_choice, check_count
from lightning_prune.core.criteria import DATA_FREE, required_statistics
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Weight
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import Couples, Criterion, Granularity, Scope

REWIND = ("weights", "learning_rate")


@dataclass(frozen=True)
class RewindingRecipe:
    """How sparse the last training is, and how the ones before lead there.

    Args:
        sparsity: fraction of the groups removed in the end, in [0, 1); numbers by name pattern; None where the scope
            prescribes it.
        criterion: how good each weight is, by value or name.
        granularity: what goes as one piece, of single tensors.
        scope: who competes with whom.
        include: patterns or module types, as for `Recipe`.
        exclude: patterns or module types.
        num_levels: how often it is pruned and trained again, at least 1.
        rewind: what goes back, "weights" (all of the run) or the "learning_rate" alone.
        epoch: the epoch that the run goes back to the beginning of, at least 0.
        step: given in place of `epoch`: the run goes back to where it was after so many optimizer steps, at least 0.

    Raises:
        ValueError: a value out of its range, both of `epoch` and `step`, a criterion that needs data, or a granularity
            that makes models smaller.

    Example:
        >>> [round(RewindingRecipe(0.75, num_levels=2).sparsity_at(level, 0.75), 4) for level in (0, 1, 2)]
        [0.0, 0.5, 0.75]
    """

    sparsity: float | Mapping[str, float] | None = None
    criterion: Criterion = field(default_factory=Magnitude)
    granularity: Granularity | Couples = field(default_factory=Weight)
    scope: Scope = field(default_factory=Global)
    include: Sequence[Any] | None = None
    exclude: Sequence[Any] = ()
    num_levels: int = 5
    rewind: str = "weights"
    epoch: int = 0
    step: int | None = None

    def __post_init__(self) -> None:
        check_count("num_levels", self.num_levels, minimum=1)
        check_choice("rewind", self.rewind, REWIND)
        check_count("epoch", self.epoch, minimum=0)
        if self.step is not None:
            check_count("step", self.step, minimum=0)
            if self.epoch:
                raise ValueError(
                    f"`step` takes the place of `epoch`, which is 0 with it, but got step={self.step} and "
                    f"epoch={self.epoch}: set epoch=0, or leave out the step."
                )
        if more := set(required_statistics(self.criterion)) - DATA_FREE:
            raise ValueError(
                f"`criterion` reads {sorted(DATA_FREE)} of weights between two trainings, but got {self.criterion}, "
                f"which reads {sorted(more)}."
            )
        if isinstance(self.granularity, Couples):
            raise ValueError(
                "`granularity` is one of single tensors, since weights that were cut cannot go back, but got "
                f"{self.granularity}."
            )
        assert self.plain

    @cached_property
    def plain(self) -> Recipe:
        """The part of it that any pruner knows."""
        return Recipe(self.sparsity, self.criterion, self.granularity, self.scope, self.include, self.exclude)

    @property
    def place(self) -> str:
        """Where the run goes back to, in words."""
        return f"epoch {self.epoch}" if self.step is None else f"step {self.step:,}"

    def sparsity_at(self, level: int, final: float) -> float:
        """Return the sparsity of a level: density falls by the same factor at each, 1 - (1 - final)^(level / all)."""
        return final if level == self.num_levels else 1.0 - (1.0 - final) ** (level / self.num_levels)

    def start(self, length: int, steps_per_epoch: float) -> int:
        """Return the epoch in which levels start: `epoch`, or the one in which `step` lies.

        Args:
            length: epochs of the first training.
            steps_per_epoch: optimizer steps of one epoch; infinite where nobody can tell.

        Raises:
            ValueError: it is none of the first training, or nobody can tell.

        Example:
            >>> RewindingRecipe(0.9, step=25).start(length=4, steps_per_epoch=10)
            2
        """
        if self.step is None:
            if self.epoch >= length:
                raise ValueError(f"`epoch` is one of the first training's {length}, but got {self.epoch}.")
            return self.epoch
        if not math.isfinite(steps_per_epoch):
            raise ValueError(
                "`step` is one of a run whose epochs have a known length, which cannot be told here: set "
                f"`limit_train_batches` to a number of batches, or give `epoch` instead, but got {self.step}."
            )
        if self.step >= length * steps_per_epoch:
            last = round(length * steps_per_epoch) - 1
            raise ValueError(f"`step` is one of the first training's, from 0 to {last}, but got {self.step}.")
        return int(self.step // steps_per_epoch)

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        own = ("num_levels", "rewind", "epoch" if self.step is None else "step")
        return self.plain.describe() | {name: str(getattr(self, name)) for name in own}
