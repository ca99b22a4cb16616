"""Dynamic sparse training on one tensor: some weights are dropped, as many are grown elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning_prune import core
from lightning_prune.core.checks import check_noun, check_range
from lightning_prune.core.criteria import DATA_FREE, check_can_train, required_statistics
from lightning_prune.core.criteria.gradients import GradientMagnitude
from lightning_prune.core.criteria.weights import Magnitude, Random
from lightning_prune.core.recipe import Recipe, as_text
from lightning_prune.core.schedules import Cosine
from lightning_prune.core.scopes.allocations import ERK
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import Criterion, Schedule, Scope

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseRecipe:
    """What is sparse from the start, and how the places of its weights change in training.

    Args:
        sparsity: fraction of the weights that are zero in the end, in [0, 1); numbers by name pattern; None where the
            scope prescribes it.
        criterion: how good each active weight is; the worst are dropped.
        grow: how good each inactive place is; the best are grown. Scores may be of any sign.
        initial: which weights the training starts with; of their values and names only, as no data has been seen.
        scope: how many weights each parameter has, and where they may lie.
        drop_fraction: the fraction of the active weights that is dropped at the first update, in [0, 1].
        decay: progress through the window -> how much of `drop_fraction` is gone, both in [0, 1]; None keeps it.
        include: patterns or module types, as for `Recipe`.
        exclude: patterns or module types.

    Raises:
        ValueError: a value out of its range, or criteria that need what training does not show.
    """

    sparsity: float | Mapping[str, float] | None = None
    criterion: Criterion = field(default_factory=Magnitude)
    grow: Criterion = field(default_factory=GradientMagnitude)
    initial: Criterion = field(default_factory=Random)
    scope: Scope = field(default_factory=ERK)
    drop_fraction: float = 0.3
    decay: Schedule | None = field(default_factory=Cosine)
    include: Sequence[Any] | None = None
    exclude: Sequence[Any] = ()

    def __post_init__(self) -> None:
        check_range("drop_fraction", self.drop_fraction, 0.0, 1.0, "a number in [0, 1]")
        if self.decay is not None:
            check_noun("decay", self.decay, "Cosine()", "__call__")
        for name in ("grow", "initial"):
            check_noun(name, getattr(self, name), "Random()", "__call__")
        check_can_train(self.criterion)
        check_can_train(self.grow)
        if more := set(required_statistics(self.initial)) - DATA_FREE:
            raise ValueError(
                f"`initial` reads {sorted(DATA_FREE)} of weights, since no data has been seen, but got {self.initial}, "
                f"which reads {sorted(more)}."
            )
        assert self.plain

    @cached_property
    def plain(self) -> Recipe:
        """The part of it that any pruner knows: sparsity, criterion, scope and targets."""
        is_by_name = isinstance(self.sparsity, Mapping) and self.scope == ERK()
        scope = Global() if is_by_name else self.scope
        return Recipe(self.sparsity, self.criterion, scope=scope, include=self.include, exclude=self.exclude)

    def dropped(self, progress: float) -> float:
        """Return the fraction of the active weights that is dropped at a progress in [0, 1] through the window."""
        left = 1.0 if self.decay is None else 1.0 - self.decay(progress)
        return self.drop_fraction * left

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        own = ("grow", "initial", "drop_fraction", "decay")
        return self.plain.describe() | {name: as_text(getattr(self, name)) for name in own}


def regrow(
    mask: Tensor, drop_scores: Tensor, grow_scores: Tensor, fraction: float, name: str = "scores"
) -> Tensor:
    """Drop the worst active weights of a layer, and grow as many in each row as it has lost.

    Evci et al. 2020, RigL (arXiv:1911.11134), algorithm 1, where the layer is one row. A weight that was just dropped
    is a free place too, and one that is grown again has never left: so each row has as many active weights as before,
    to the weight, however few places are free. With the rows of a weight matrix it is the constant fan-in of SRigL
    (Lasby et al. 2023, arXiv:2305.02299).

    Args:
        mask: (R, C), True is active.
        drop_scores: (R, C), how good the active weights are; others are not looked at.
        grow_scores: (R, C), how good the free places are.
        fraction: of the layer's active weights, in [0, 1], to the nearest whole number.
        name: of the layer's weight, for messages.

    Returns:
        The new mask (R, C). Among equals the earlier place stays, or is grown.

    Raises:
        ValueError: a score is NaN.

    Example:
        >>> import torch
        >>> mask, scores = torch.tensor([[True, True, False, False]]), torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        >>> regrow(mask, scores, torch.tensor([[0.0, 0.0, 3.0, 4.0]]), 0.5)
        tensor([[False,  True, False,  True]])
    """
    num_active = mask.sum(1)
    total = int(num_active.sum())
    active = drop_scores.masked_fill(~mask, -math.inf)
    kept = core.keep_top({name: active}, total - round(fraction * total))[name]
    return kept | _best(grow_scores.masked_fill(kept, -math.inf), num_active - kept.sum(1), name)


def _best(scores: Tensor, counts: Tensor, name: str) -> Tensor:
    """Return a mask of as many of each row's highest scores as `counts` says."""
    if len(counts) == 1:
        return core.keep_top({name: scores}, int(counts))[name]
    core.keep_top_rows(scores, 0, name)  # refuses what cannot be ranked
    most = int(counts.max())
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :most]
    is_kept = counts[:, None] > counts.new_tensor(range(most))
    return is_kept.new_zeros(scores.shape).scatter_(1, best, is_kept)
