"""Exact selection of the best k of n scores that lie in many tensors, without sorting or concatenating them.

Floats are read as integer keys of the same order. A pass over the scores counts those above a bracket of keys, and in
each bin of the bracket; that tells which part holds the k-th largest: a bin, or what lies above or below the bracket.
The next pass looks there, until one key is left. The first bracket is guessed from a sample: a bad guess costs passes,
and the answer is exact either way. What is held beside the scores of one tensor is a histogram and a chunk.

Where each process holds a part of the scores (`LazyScores.across`), histograms are summed up over the processes and no
score leaves its own: each of them finds its part of the exact answer for the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.core import sampling
from lightning_prune.core.across import shared_ties, widest
from lightning_prune.core.keys import Bracket, key_of, keys_of, value_of
from lightning_prune.core.sampling import counted_on, guess, num_nan_of, refuse_nan, sample_of
from lightning_prune.core.types import Masks, Name, Scores, Shape, across_of, pieces_of, shapes_of

CHUNK = 1 << 18  # scores read at a time on CPU: they stay in cache between one operation and the next


def keep_top(scores: Scores, num_keep: int) -> Masks:
    """Return masks of exactly the `num_keep` highest scores over all tensors, True is kept.

    Among equal scores the lower (tensor in the order of the mapping, flat index) is kept; +0 and -0 are equal.

    Args:
        scores: floating-point tensors of any shape, on any device; each is read three times where the first bracket
            holds the k-th score of float32 or less, and about twice more for float64 or where it does not.
        num_keep: from 0 to the number of all scores.

    Raises:
        ValueError: `num_keep` is out of its range, or a score is NaN.

    Example:
        >>> keep_top({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[1.0], [1.0]])}, 2)
        {'a': tensor([True, True]), 'b': tensor([[False],
                [False]])}
    """
    total = sum(math.prod(shape) for shape in shapes_of(scores).values())
    if not 0 <= num_keep <= total:
        raise ValueError(f"`num_keep` is a number of scores, in [0, {total}], but got {num_keep}.")
    if num_keep in (0, total):
        refuse_nan(scores, [sum(int(num_nan_of(p)) for p in pieces_of(scores, name)) for name in scores])
        return {name: _constant(scores[name], num_keep > 0) for name in scores}
    return _masks(scores, _find_cut(scores, num_keep, total))


def keep_top_rows(scores: Tensor, num_keep: int, name: Name = "scores") -> Tensor:
    """Return a mask of exactly the `num_keep` highest scores of each row; among equals the lower index is kept.

    Args:
        scores: (rows, columns), floating-point.
        num_keep: from 0 to the number of columns.
        name: whose scores they are, for messages.

    Raises:
        ValueError: `num_keep` is out of its range, or a score is NaN.

    Example:
        >>> keep_top_rows(torch.tensor([[1.0, 2.0, 2.0], [3.0, 1.0, 2.0]]), 1)
        tensor([[False,  True, False],
                [ True, False, False]])
    """
    num_columns = scores.shape[1]
    if not 0 <= num_keep <= num_columns:
        raise ValueError(f"`num_keep` is a number of columns, in [0, {num_columns}], but got {num_keep}.")
    refuse_nan({name: scores}, [int(num_nan_of(scores))])
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    height = max(1, CHUNK // max(1, num_columns))
    for part, marks in zip(torch.split(scores, height), torch.split(mask, height), strict=True):
        best = part.sort(dim=1, descending=True, stable=True).indices[:, :num_keep]
        marks.scatter_(1, best, True)
    return mask


@dataclass(frozen=True)
class _Cut:
    """Scores above `threshold` are kept, and of the `num_equal` scores equal to it the first `num_ties`."""

    threshold: float
    dtype: torch.dtype
    num_ties: int
    num_equal: int


def _find_cut(scores: Scores, num_keep: int, total: int) -> _Cut:
    """Find the `num_keep`-th largest score, 0 < `num_keep` < `total`."""
    stride = max(1, total // sampling.NUM_SAMPLES)
    sample, dtype = sample_of(scores, stride)
    bounds = Bracket(key_of(-math.inf, dtype), key_of(math.inf, dtype))
    across = across_of(scores)
    bracket = guess(sample, num_keep / total, stride == 1 and across is None, bounds, dtype)
    bracket = bracket if across is None else widest(across, bracket, bounds)
    while bracket.low <= bracket.high:
        num_above, histogram = _count(scores, bracket, dtype)
        from_top = histogram.flip(0).cumsum(0) + num_above
        if num_keep <= num_above:
            bounds = bracket = Bracket(bracket.high + 1, bounds.high)
        elif num_keep > int(from_top[-1]):
            bounds = bracket = Bracket(bounds.low, bracket.low - 1)
        else:
            place = int(torch.searchsorted(from_top, num_keep))
            num_equal = int(histogram[-1 - place])
            bounds = bracket = bracket.bin(len(histogram) - 1 - place)
            if bracket.low == bracket.high:
                num_ties = num_keep - int(from_top[place]) + num_equal
                return _Cut(value_of(bracket.low, dtype), dtype, num_ties, num_equal)
    raise ValueError(
        "`scores` are the same each time they are read, but got others: a criterion draws random numbers without seed."
    )


def _count(scores: Scores, bracket: Bracket, dtype: torch.dtype) -> tuple[int, Tensor]:
    """Count the scores above a bracket, and those in each of its bins."""
    tally = torch.empty(0, dtype=torch.int64)
    for name in scores:
        for values in _chunks(pieces_of(scores, name), dtype):
            if not len(tally):
                tally = tally.new_zeros(bracket.num_bins + 1, device=counted_on(values))
            _count_into(tally, values, bracket)
            del values  # gone before the next one is computed
    tally = tally if len(tally) else tally.new_zeros(bracket.num_bins + 1)
    if (across := across_of(scores)) is not None:
        tally = across.sum(tally)
    return int(tally[-1]), tally[:-1]


def _count_into(tally: Tensor, values: Tensor, bracket: Bracket) -> None:
    """Add how many of some scores are in each bin of the bracket, and in the last place how many are above it."""
    low, high = value_of(bracket.low, values.dtype), value_of(bracket.high, values.dtype)
    above, inside = values > high, values >= low
    tally[-1] += torch.count_nonzero(above).to(tally.device)
    inside ^= above
    if bracket.low == bracket.high:
        tally[0] += torch.count_nonzero(inside).to(tally.device)
    else:
        bins = bracket.bins_of(keys_of(values[inside])).to(tally.device)
        tally.scatter_add_(0, bins, bins.new_ones(()).expand_as(bins))


def _masks(scores: Scores, cut: _Cut) -> Masks:
    if (across := across_of(scores)) is not None and cut.num_ties < cut.num_equal:
        equal = [_num_equal(pieces_of(scores, name), cut) for name in scores]
        shares = shared_ties(across, equal, cut.num_ties)
        return {
            name: _mask_one(pieces_of(scores, name), None, cut, share)[0]
            for name, share in zip(scores, shares, strict=True)
        }
    left, masks = cut.num_ties, dict[Name, Tensor]()
    for name, shape in shapes_of(scores).items():
        own = shape if across is None else None
        masks[name], left = _mask_one(pieces_of(scores, name), own, cut, left)
    return masks


def _num_equal(pieces: Iterable[Tensor], cut: _Cut) -> int:
    return sum(int(torch.count_nonzero(values == cut.threshold)) for values in _chunks(pieces, cut.dtype))


def _mask_one(pieces: Iterable[Tensor], shape: Shape | None, cut: _Cut, left: int) -> tuple[Tensor, int]:
    """Return a mask with the first `left` ties kept, and how many are left; no shape is that of the only piece."""
    marks, start = None, 0
    compare = torch.ge if cut.num_ties == cut.num_equal else torch.gt
    for piece in pieces:
        if marks is None:
            mask = torch.empty(piece.shape if shape is None else shape, dtype=torch.bool, device=piece.device)
            marks, threshold = (
                mask.view(-1),
                torch.tensor(cut.threshold, dtype=cut.dtype, device=piece.device),
            )
        for values in _chunks((piece,), cut.dtype):
            here = marks[start : start + values.numel()]
            start += values.numel()
            compare(values, threshold, out=here)
            if compare is torch.gt and left:
                ties = (values == threshold).nonzero().view(-1)[:left]
                here[ties] = True
                left -= ties.numel()
    assert marks is not None
    return mask, left


def _constant(scores: Tensor, value: bool) -> Tensor:
    return torch.full(scores.shape, value, dtype=torch.bool, device=scores.device)


def _chunks(pieces: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield pieces flat and in a dtype: at most `CHUNK` entries at a time on CPU, whole elsewhere."""
    for piece in pieces:
        flat = piece.reshape(-1)
        for part in torch.split(flat, CHUNK) if flat.device.type == "cpu" else (flat,):
            yield part.to(dtype)
