"""Masks that differ have other checksums, wherever they differ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.core.checksums import LENGTH, checksum


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_a_mask_differs_from_all_that_are_not_equal(bits, data):
    mask = torch.tensor(bits)
    other = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(bits), max_size=len(bits))))
    assert bool(checksum(mask) == checksum(other)) is torch.equal(mask, other)


@pytest.mark.parametrize("places", [(0, 1), (0, 8), (7, 8 * LENGTH), (8 * LENGTH - 1, 16 * LENGTH + 3)])
def test_weights_that_change_places_are_seen(places):
    mask = torch.rand(16 * LENGTH + 4, generator=torch.Generator().manual_seed(0)) < 0.1
    mask[places[0]], mask[places[1]] = True, False
    other = mask.clone()
    other[places[0]], other[places[1]] = False, True
    assert checksum(mask) != checksum(other)


def test_the_layout_in_memory_does_not_count():
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    turned = mask.t().contiguous().t()
    assert checksum(mask) == checksum(turned) == checksum(torch.cat([mask.new_ones(3), mask.flatten()])[3:])
    assert checksum(mask) == checksum(mask.view(3, 10))
