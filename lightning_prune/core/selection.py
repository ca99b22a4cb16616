"""Exact selection of the best k of n scores that lie in many tensors, without sorting or concatenating them.

Floats of one sign are ordered as their bits are, so a float can be turned into an integer key of the same order. The
k-th largest key is found digit by digit, 16 bits at a time: a pass over the scores makes a histogram of the digit
among the keys that begin with the digits found so far (two passes for float32, four for float64). What is held beside
the scores of one tensor is a histogram and a chunk.

Histograms of several shards may be added up, so the same passes would give the exact answer over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.core.types import Masks, Name, Scores, shapes_of

CHUNK = 1 << 18  # scores read at a time on CPU: they stay in cache between one operation and the next
DIGIT_BITS = 16


def keep_top(scores: Scores, num_keep: int) -> Masks:
    """Return masks of exactly the `num_keep` highest scores over all tensors, True is kept.

    Among equal scores the lower (tensor in the order of the mapping, flat index) is kept; +0 and -0 are equal.

    Args:
        scores: floating-point tensors of any shape, on any device; each is read once more than there are digits.
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
        return {name: _constant(name, scores[name], num_keep > 0) for name in scores}
    return _masks(scores, _find_cut(scores, num_keep))


def keep_top_rows(scores: Tensor, num_keep: int) -> Tensor:
    """Return a mask of exactly the `num_keep` highest scores of each row; among equals the lower index is kept.

    Args:
        scores: (rows, columns), floating-point.
        num_keep: from 0 to the number of columns.

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
    _check_nan("scores", scores)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    height = max(1, CHUNK // max(1, num_columns))
    for part, marks in zip(torch.split(scores, height), torch.split(mask, height), strict=True):
        best = part.sort(dim=1, descending=True, stable=True).indices[:, :num_keep]
        marks.scatter_(1, best, True)
    return mask


@dataclass(frozen=True)
class _Cut:
    """Scores above `threshold` are kept, and of the `num_equal` scores equal to it the first `num_ties`."""

    threshold: Tensor
    num_ties: int
    num_equal: int


def _find_cut(scores: Scores, num_keep: int, dtype: torch.dtype = torch.float32) -> _Cut:
    """Find the `num_keep`-th largest score, one digit of its key after the other; 0 < `num_keep` <= all scores."""
    base, found, left = -(1 << (DIGIT_BITS - 1)), None, num_keep
    for shift in range(torch.finfo(dtype).bits - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64)
        for name in scores:
            tensor = scores[name]
            if tensor.dtype == torch.float64 and dtype != torch.float64:
                return _find_cut(scores, num_keep, torch.float64)
            if found is None:
                _check_nan(name, tensor)
            for chunk in _chunks(tensor):
                keys = _keys(chunk, dtype)
                if found is not None:
                    keys = keys[keys >> (shift + DIGIT_BITS) == found]
                histogram += torch.bincount((keys >> shift) - base, minlength=histogram.numel()).cpu()
        from_top = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, torch.tensor(left)))
        num_equal = int(histogram[-1 - place])
        left -= int(from_top[place]) - num_equal
        found = base + histogram.numel() - 1 - place
        base = found << DIGIT_BITS
    assert found is not None
    return _Cut(_value(found, dtype), left, num_equal)


def _keys(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn floats into integers of the same order: the bits of negative ones, which run backwards, are flipped."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    bits = torch.add(values.to(dtype), 0.0).view(integer)  # + 0.0 makes one zero of the two
    signs = bits >> (torch.iinfo(integer).bits - 1)
    return bits.bitwise_xor_(signs.bitwise_and_(torch.iinfo(integer).max))


def _value(key: int, dtype: torch.dtype) -> Tensor:
    """Turn a key back into the float."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    bits = torch.tensor(key, dtype=integer)
    return (bits ^ (bits >> (torch.iinfo(integer).bits - 1) & torch.iinfo(integer).max)).view(dtype)


def _masks(scores: Scores, cut: _Cut) -> Masks:
    left, masks = cut.num_ties, dict[Name, Tensor]()
    compare = torch.ge if cut.num_ties == cut.num_equal else torch.gt
    for name in scores:
        tensor = scores[name]
        masks[name] = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
        threshold = cut.threshold.to(tensor.device)
        for chunk, marks in zip(_chunks(tensor), _chunks(masks[name]), strict=True):
            values = chunk.to(threshold.dtype)
            compare(values, threshold, out=marks)
            if compare is torch.gt and left:
                ties = (values == threshold).nonzero().view(-1)[:left]
                marks[ties] = True
                left -= ties.numel()
    return masks


def _constant(name: Name, scores: Tensor, value: bool) -> Tensor:
    _check_nan(name, scores)
    return torch.full(scores.shape, value, dtype=torch.bool, device=scores.device)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor in flat pieces: of `CHUNK` scores on CPU, whole elsewhere."""
    flat = tensor.reshape(-1)
    yield from torch.split(flat, CHUNK) if flat.device.type == "cpu" else (flat,)


def _check_nan(name: Name, tensor: Tensor) -> None:
    if not bool(tensor.sum().isfinite()) and (num_nan := int(tensor.isnan().sum())):
        raise ValueError(
            f"`{name}` has scores that can be ranked, but got {num_nan} NaN in shape {tuple(tensor.shape)}: look at "
            "its weights and at what the criterion reads (gradients, activations)."
        )
