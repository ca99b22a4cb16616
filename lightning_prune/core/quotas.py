"""How many weights of a layer's matrix are kept, and where they may lie, for those that choose them span by span."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_prune.core.selection import keep_top, keep_top_rows
from lightning_prune.core.types import Divides, Scope


@dataclass(frozen=True)
class Quota:
    """The part of a scope's answer that holds for one matrix.

    Args:
        scope: says whether rows, or blocks of m along them, keep equally many.
        num_keep: weights kept of the whole matrix.
        shape: (out, in).

    Example:
        >>> import torch
        >>> from lightning_prune import Local
        >>> quota = Quota(Local(), num_keep=3, shape=(2, 3))
        >>> [int(quota.choose(torch.rand(2, 1), start).sum()) for start in range(3)]
        [1, 1, 1]
    """

    scope: Scope
    num_keep: int
    shape: tuple[int, int]

    @property
    def span(self) -> int | None:
        """How many columns have to be chosen at once: m for N:M; None where any number will do."""
        return getattr(self.scope, "m", None) if self.num_keep < self.shape[0] * self.shape[1] else None

    def choose(self, scores: Tensor, start: int) -> Tensor:
        """Return the mask of a span of columns.

        Args:
            scores: (out, c), higher is kept.
            start: the span's first column. Spans from the first column to the last keep `num_keep` together, exactly.
        """
        if isinstance(self.scope, Divides) and self.num_keep < self.shape[0] * self.shape[1]:
            rows = self.scope.rows(scores)
            each = self.num_keep * rows.shape[1] / (self.shape[0] * self.shape[1])
            whole = rows.shape[1] == scores.shape[1] and self.span is None
            count = (
                self._between(self.num_keep // self.shape[0], start, scores.shape[1])
                if whole
                else round(each)
            )
            return self.scope.from_rows(keep_top_rows(rows, count), tuple(scores.shape))
        count = self._between(self.num_keep, start, scores.shape[1])
        return keep_top({"": scores}, count)[""]

    def _between(self, total: int, start: int, num_columns: int) -> int:
        """Return the share of `total` that falls to a span of columns."""
        size = self.shape[1]
        return round(total * (start + num_columns) / size) - round(total * start / size)
