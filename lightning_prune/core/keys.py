"""Integer keys of floats, of the same order: what is found digit by digit among integers is found among floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BIN_BITS = 20  # a bracket is cut into at most 2^20 bins, or one more where its first one is not whole


def keys_of(values: Tensor) -> Tensor:
    """Return integers of the order of float32 or float64 `values`; +0 and -0 are both 0.

    A key is the bits of the absolute value, read as an integer, with the sign of the value.

    Example:
        >>> keys_of(torch.tensor([-1e-45, -0.0, 0.0, 1e-45, 3e-45]))
        tensor([-1,  0,  0,  1,  2], dtype=torch.int32)
    """
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = values.contiguous().view(integer)
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)


def key_of(value: float, dtype: torch.dtype) -> int:
    """Return the key that `value` has in a tensor of `dtype`, float32 or float64."""
    return int(keys_of(torch.tensor([value], dtype=dtype)))


def value_of(key: int, dtype: torch.dtype) -> float:
    """Return the value whose key in a tensor of `dtype` is `key`."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    magnitude = float(torch.tensor(abs(key), dtype=integer).view(dtype))
    return -magnitude if key < 0 else magnitude


@dataclass(frozen=True)
class Bracket:
    """The keys from `low` to `high`, both included, and the bins of 2^`shift` keys that it is cut into.

    Example:
        >>> bracket = Bracket(5, 5 + 2**21)
        >>> bracket.shift, bracket.num_bins, bracket.bin(0), bracket.bin(1)
        (2, 524289, Bracket(low=5, high=7), Bracket(low=8, high=11))
    """

    low: int
    high: int

    @property
    def shift(self) -> int:
        """Return the number of low bits that the keys of one bin differ in."""
        return max(0, (self.high - self.low).bit_length() - BIN_BITS)

    @property
    def num_bins(self) -> int:
        """Return the number of bins."""
        return (self.high >> self.shift) - (self.low >> self.shift) + 1

    def bins_of(self, keys: Tensor) -> Tensor:
        """Return the place of each key's bin, from 0; the keys are within the bracket."""
        return (keys.long() >> self.shift) - (self.low >> self.shift)

    def bin(self, place: int) -> Bracket:
        """Return one bin, without what it has beyond the bracket."""
        first = ((self.low >> self.shift) + place) << self.shift
        return Bracket(max(self.low, first), min(self.high, first + (1 << self.shift) - 1))
