"""Gradients of weights behind masks, against torch's autograd on the published functions."""

import pytest
import torch

from lightning_prune import Channel, Dormant, StraightThrough, TopKAST, TrainTimePruning
from tests.members import members

SHAPE = (3, 5)


class PublishedStraightThrough(torch.autograd.Function):
    """Zhou et al. 2021: forward m w; backward the gradient as it comes, and the decay of what is masked."""

    @staticmethod
    def forward(ctx, weight, mask, decay):
        ctx.save_for_backward(weight)
        ctx.mask, ctx.decay = mask, decay
        return weight * mask

    @staticmethod
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        return grad_output + ctx.decay * (1 - ctx.mask.to(weight.dtype)) * weight, None, None


def example(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(SHAPE, generator=draw).to(dtype) for _ in range(2))
    return weight, grad, torch.rand(SHAPE, generator=draw) > 0.5


def by_autograd(read, grad, weight):
    weight = weight.clone().requires_grad_()
    read(weight).backward(grad)
    return weight.grad


@pytest.mark.parametrize("masking", members("masking"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_masking_is_pure_and_leaves_kept_weights_their_gradient(masking, dtype):
    weight, grad, mask = example(dtype)
    before = weight.clone(), grad.clone(), mask.clone()
    found = masking.gradient(weight=weight, grad=grad, mask=mask)
    assert found.shape == SHAPE and found.dtype == dtype
    assert torch.equal(found[mask], grad[mask])
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, grad, mask), strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_straight_through_is_the_published_function(decay):
    weight, grad, mask = example()
    expected = by_autograd(lambda w: PublishedStraightThrough.apply(w, mask, decay), grad, weight)
    found = StraightThrough(decay).gradient(weight=weight, grad=grad, mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_dormant_is_the_derivative():
    weight, grad, mask = example()
    expected = by_autograd(lambda w: w * mask, grad, weight)
    assert torch.equal(Dormant().gradient(weight=weight, grad=grad, mask=mask), expected)


@pytest.mark.parametrize("wider", [0.0, 0.2, 1.0])
def test_top_kast_is_the_gradient_of_the_larger_set(wider):
    """Written out weight by weight: the largest of what is pruned learn, and decay by the rate over the density."""
    weight, grad, mask = example()
    found = TopKAST(wider, decay=0.3).gradient(weight=weight, grad=grad, mask=mask).flatten().tolist()
    w, g, m = (tensor.flatten().tolist() for tensor in (weight, grad, mask))
    pruned = sorted((i for i in range(15) if not m[i]), key=lambda i: -abs(w[i]))
    learning = pruned[: round(wider * 15)]
    for i in range(15):
        expected = g[i] if m[i] else g[i] + 0.3 / (sum(m) / 15) * w[i] if i in learning else 0.0
        assert found[i] == pytest.approx(expected, rel=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`wider` is a fraction"):
        TopKAST(wider=1.5)
    with pytest.raises(ValueError, match="`decay` is a number of at least 0, but got -1.0"):
        StraightThrough(decay=-1.0)
    with pytest.raises(
        ValueError, match=r"`masking` is for granularities of single tensors, but got Dormant\(\)"
    ):
        TrainTimePruning(0.5, granularity=Channel(), masking=Dormant())
