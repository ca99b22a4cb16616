"""Exact selection where each process holds a part of each tensor: counts are put together, scores are not.

A part is a number of rows, along dim 0, and those of a later process come after: so flat indices are in the order of
the processes, and so are ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lightning_prune.core.keys import Bracket
from lightning_prune.core.types import Across, Name, across_of

if TYPE_CHECKING:
    from lightning_prune.core.types import Masks, Scores


def total_of(across: Across | None, counts: Sequence[int]) -> list[int]:
    """Return the sums of some counts over all processes."""
    return list(counts) if across is None else across.sum(torch.tensor(counts, dtype=torch.int64)).tolist()


def widest(across: Across, bracket: Bracket, bounds: Bracket) -> Bracket:
    """Return what spans the guesses of all processes: between the least and the largest of their parts' quantiles lies
    that of the whole.
    """
    found = across.collect(torch.tensor([bracket.low, bracket.high], dtype=torch.int64))
    low, high = max(int(found[:, 0].min()), bounds.low), min(int(found[:, 1].max()), bounds.high)
    return Bracket(low, high) if low <= high else bounds


def shared_ties(across: Across, num_equal: Sequence[int], num_ties: int) -> list[int]:
    """Share out ties in the order of (tensor, index): return how many each tensor's part on this process gets at most.

    Args:
        across: the processes.
        num_equal: for each tensor, how many scores of the part here are equal to the threshold.
        num_ties: how many of them are kept in all.
    """
    found = (
        across.collect(torch.tensor(num_equal, dtype=torch.int64)).t().contiguous()
    )  # (tensors, processes)
    before = (found.flatten().cumsum(0) - found.flatten()).view_as(found)[:, across.rank]
    return (num_ties - before).clamp_min(0).tolist()


def num_kept_of(scores: Scores, masks: Masks) -> dict[Name, int]:
    """Return how many groups of each tensor masks keep, those of the parts on other processes among them."""
    counts = [int(mask.sum()) for mask in masks.values()]
    return dict(zip(masks, total_of(across_of(scores), counts), strict=True))
