"""What is pruned between trainings, and what goes back before the next one."""

from __future__ import annotations

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

    Raises:
        ValueError: a value out of its range, a criterion that needs data, or a granularity that makes models smaller.

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

    def __post_init__(self) -> None:
        check_count("num_levels", self.num_levels, minimum=1)
        check_choice("rewind", self.rewind, REWIND)
        check_count("epoch", self.epoch, minimum=0)
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

    def sparsity_at(self, level: int, final: float) -> float:
        """Return the sparsity of a level: density falls by the same factor at each, 1 - (1 - final)^(level / all)."""
        return final if level == self.num_levels else 1.0 - (1.0 - final) ** (level / self.num_levels)

    def num_epochs(self, level: int, length: int) -> int:
        """Return how many epochs are done when a level ends; the first training has `length`."""
        return length + level * (length - self.epoch)

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        own = ("num_levels", "rewind", "epoch")
        return self.plain.describe() | {name: str(getattr(self, name)) for name in own}
