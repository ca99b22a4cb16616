"""Compression is undone bit for bit, whatever the dtype, and counted against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.core.packing import as_integers, compress, compressed_bytes, decompress

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
DTYPES += [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]


def some(dtype: torch.dtype, size: int, seed: int) -> torch.Tensor:
    """Random bits, NaN and minus zero among them, of which most are zero."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size, width), generator=generator).to(
        torch.uint8
    )
    raw[torch.rand(size, generator=generator) < 0.7] = 0
    return raw.flatten().view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=st.integers(0, 70), seed=st.integers(0, 99))
def test_what_comes_back_is_equal_bit_for_bit(dtype, size, seed):
    tensor = some(dtype, size, seed)
    bits, values = compress(tensor)
    again = decompress("a", bits, values, (size,))
    assert again.dtype == dtype and torch.equal(as_integers(again), as_integers(tensor))
    assert bits.numel() + values.numel() * values.element_size() == compressed_bytes(tensor)


def test_minus_zero_and_nan_are_no_zeros():
    tensor = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45])
    again = decompress("a", *compress(tensor), (5,))
    assert torch.equal(again.view(torch.int32), tensor.view(torch.int32))
    assert compress(tensor)[1].numel() == 4


def test_the_bits_are_those_of_numpy():
    tensor = some(torch.float32, 1000, 0)
    expected = np.packbits(tensor.view(torch.int32).numpy() != 0, bitorder="little")
    assert np.array_equal(compress(tensor)[0].numpy(), expected)


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[0, 0]])
def test_strides_and_scalars_are_no_matter(view):
    tensor = view(some(torch.float32, 24, 1).view(4, 6))
    assert torch.equal(
        decompress("a", *compress(tensor), tuple(tensor.shape)).nan_to_num(7), tensor.nan_to_num(7)
    )


def test_parts_that_do_not_belong_together_are_refused():
    bits, values = compress(torch.eye(3))
    with pytest.raises(ValueError, match="`a`: the values are as many as the bits that are set, 3, but got"):
        decompress("a", bits, values[:2], (3, 3))
    with pytest.raises(ValueError, match="`a`: a mask of shape .* is stored in 4 bytes, but got 2"):
        decompress("a", bits, values, (5, 5))
    with pytest.raises(
        ValueError, match="`dtype` has entries of 1, 2, 4 or 8 bytes, but got torch.complex128"
    ):
        compress(torch.zeros(2, dtype=torch.complex128))
