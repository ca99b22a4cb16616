"""Keys have the order of the floats, and brackets cut them without gap or overlap."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.core.keys import BIN_BITS, Bracket, key_of, keys_of, value_of

WIDTHS = {torch.float32: 32, torch.float64: 64}
TOPS = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@given(data=st.data())
def test_keys_are_ordered_as_values(dtype, data):
    values = data.draw(st.lists(st.floats(width=WIDTHS[dtype], allow_nan=False), min_size=2, max_size=2))
    low, high = keys_of(torch.tensor(values, dtype=dtype)).tolist()
    assert (low < high) == (values[0] < values[1]) and (low == high) == (values[0] == values[1])
    assert [value_of(key, dtype) for key in (low, high)] == values


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@given(data=st.data())
def test_neighbouring_keys_are_neighbouring_values(dtype, data):
    key = data.draw(st.integers(-TOPS[dtype], TOPS[dtype] - 1))
    number = np.float32 if dtype == torch.float32 else np.float64
    with np.errstate(all="ignore"):
        after = np.nextafter(number(value_of(key, dtype)), number(math.inf))
    assert value_of(key + 1, dtype) == after and key_of(float(after), dtype) == key + 1


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_infinities_are_the_ends(dtype):
    assert [key_of(v, dtype) for v in (-math.inf, -0.0, 0.0, math.inf)] == [-TOPS[dtype], 0, 0, TOPS[dtype]]


@given(low=st.integers(-(2**62), 2**62), width=st.integers(0, 2**62), data=st.data())
def test_bins_hold_each_key_of_a_bracket_once(low, width, data):
    bracket = Bracket(low, low + width)
    key = data.draw(st.integers(bracket.low, bracket.high))
    place = int(bracket.bins_of(torch.tensor([key])))
    found = bracket.bin(place)
    assert 0 <= place < bracket.num_bins <= 2**BIN_BITS + 1 and found.low <= key <= found.high
    assert bracket.bin(0).low == bracket.low and bracket.bin(bracket.num_bins - 1).high == bracket.high
    if found.high < bracket.high:
        assert bracket.bin(place + 1).low == found.high + 1
    assert width == 0 or found.high - found.low < width
