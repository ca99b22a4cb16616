"""Laws of every granularity, and each one against loops over single weights."""

import itertools

import numpy as np
import pytest
import torch

from lightning_prune import Block, Kernel, Slice, Weight
from tests.members import members

SHAPES = [(4, 6), (5, 7), (6, 4, 3, 3), (3, 2, 5)]


@pytest.mark.parametrize("granularity", members("granularity"), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_partition_the_weights(granularity, shape):
    """Expanding one group at a time marks every weight exactly once, and one mean score per group comes back."""
    groups = granularity.reduce(torch.zeros(shape))
    seen = torch.zeros(shape, dtype=torch.int64)
    for index in itertools.product(*map(range, groups.shape)):
        one = torch.zeros(groups.shape, dtype=torch.bool)
        one[index] = True
        mask = granularity.expand(one, shape)
        assert mask.dtype == torch.bool and mask.shape == shape and mask.any()
        assert torch.equal(granularity.reduce(mask.float()) > 0, one)
        seen += mask
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("granularity", members("granularity"), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_granularity_is_pure_and_writable(granularity, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    granularity.reduce(scores)
    assert torch.equal(scores, before)
    mask = granularity.expand(torch.ones(granularity.reduce(scores).shape, dtype=torch.bool), shape)
    assert mask.is_contiguous() and mask.all()
    assert granularity.reduce(torch.empty(shape, device="meta")).shape == granularity.reduce(scores).shape


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "build", [lambda r: Slice(0, r), lambda r: Slice(1, r), Kernel, lambda r: Block(2, 4, r)]
)
def test_reductions_against_numpy_over_the_expanded_group(reduction, shape, build):
    granularity = build(reduction)
    scores = -torch.rand(
        shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )  # negative: padding shows
    groups = granularity.reduce(scores)
    for index in itertools.product(*map(range, groups.shape)):
        one = torch.zeros(groups.shape, dtype=torch.bool)
        one[index] = True
        inside = scores[granularity.expand(one, shape)].numpy()
        assert float(groups[index]) == pytest.approx(float(getattr(np, reduction)(inside)))


def test_weight_is_the_identity():
    scores = torch.randn(3, 4)
    assert Weight().reduce(scores) is scores


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Slice(dim=-1), r"`dim` is a whole number of at least 0, but got -1"),
        (lambda: Slice(reduction="maen"), r"`reduction` is one of .* but got 'maen'. Did you mean mean\?"),
        (lambda: Block(height=0), r"`height` is a whole number of at least 1"),
        (lambda: Block(width=1.5), r"`width` is a whole number of at least 1"),
        (
            lambda: Slice(dim=2).reduce(torch.ones(2, 2)),
            r"`dim` is below the number of dims, but got 2 for shape \(2, 2\)",
        ),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
