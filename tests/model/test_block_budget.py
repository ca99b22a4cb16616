"""Budgets in depth: met where they fall on blocks, counted on the real small model; else refused with both sides."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import Budget, Layer, shrink
from lightning_prune.core.recipe import Recipe
from lightning_prune.examples.networks import GPT, ResNet20
from lightning_prune.graph import trace
from lightning_prune.model.block_budget import cost_without, solve_depth
from lightning_prune.model.calls import call_of
from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.history import plans_of

TOKENS = torch.arange(32).view(2, 16) % 11
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Adds something of a size, by a layer of a width."""

    def __init__(self, width=4, scale=1.0, skip=1.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width, bias=False), nn.Linear(width, 4, bias=False))
        self.scale, self.skip = scale, skip

    def forward(self, x):
        return torch.add(self.scale * self.body(x), x, alpha=self.skip)


def model_of(*blocks):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False), *blocks)


def gpt():
    torch.manual_seed(0)
    return GPT(vocab_size=11).eval()


def resnet():
    torch.manual_seed(0)
    return ResNet20().eval()


def params(model, _):
    return sum(p.numel() for p in model.parameters())


def macs(model, x):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def num_bytes(model, _):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def assert_untouched(model, state):
    assert not plans_of(model) and model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("cost", [params, macs, num_bytes])
@pytest.mark.parametrize(
    ("make", "x", "unit"), [(gpt, TOKENS, "block"), (gpt, TOKENS, "branch"), (resnet, IMAGES, "block")]
)
def test_it_is_met_exactly_where_it_falls_on_blocks(make, x, unit, cost):
    """Beside a model that lost its blocks by a sparsity, on which torch counts."""
    known = make()
    before, by_sparsity = cost(known, x), shrink(known, x, 0.5, granularity=Layer(unit))
    budget = Budget(**{cost.__name__: cost(known, x) / before}, tolerance=1e-9)
    model = make()
    plan = shrink(model, x, budget=budget, granularity=Layer(unit))
    assert plan.replaced == by_sparsity.replaced and len(plan.replaced) > 1
    assert cost(model, x) == cost(known, x)


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_what_falls_between_blocks_is_refused_with_both_sides(kind):
    """Three blocks of 32 weights each, and 64 others: without one, two or three 0.8, 0.6 and 0.4 are left."""
    model = model_of(Block(), Block(), Block())
    state = copy.deepcopy(model.state_dict())
    told = (
        rf"`budget` {kind}=0.7 is out of reach .* within reach are {kind}=0.800 and {kind}=0.600 of the dense"
    )
    with pytest.raises(ValueError, match=told):
        shrink(model, X, budget=Budget(**{kind: 0.7}), granularity=Layer())
    assert_untouched(model, state)
    with pytest.raises(
        ValueError, match=rf"within reach is {kind}=0.600 of the dense model. Allow more .*min_keep"
    ):
        shrink(model, X, budget=Budget(**{kind: 0.4}), granularity=Layer())
    assert_untouched(model, state)
    assert len(shrink(model, X, budget=Budget(**{kind: 0.61}), granularity=Layer()).replaced) == 2


def test_a_larger_tolerance_takes_the_nearest():
    plan = shrink(
        model_of(*map(Block, [4, 4, 4])), X, budget=Budget(params=0.72, tolerance=0.1), granularity=Layer()
    )
    assert len(plan.replaced) == 1


def test_what_no_ranking_reaches_is_refused_before_anything_is_ranked():
    model = model_of(Block(), Block(), Block())
    with pytest.raises(ValueError, match="within reach are params=0.800 and params=0.600"):
        DepthPruner(model, Recipe(granularity=Layer(), budget=Budget(params=0.7)), call_of(model, X))


def test_the_ranking_decides_where_blocks_are_of_unlike_size():
    """The wide block is half of all weights; where it is the last to go, half of them cannot go."""
    budget = Budget(params=0.5)
    model = model_of(Block(16, scale=1e-3), Block(), Block())
    assert shrink(model, X, budget=budget, granularity=Layer()).replaced == {"2": "skip"}
    model = model_of(Block(16, scale=1e3), Block(scale=1e-3), Block(scale=1e-2))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="within reach is params=0.750 of the dense model"):
        shrink(model, X, budget=budget, granularity=Layer())
    assert_untouched(model, state)


def test_blocks_that_cannot_go_make_room_for_the_next_ones():
    unfit = Block(scale=1e-3, skip=0.5)
    plan = shrink(model_of(unfit, Block(), Block()), X, budget=Budget(params=0.6), granularity=Layer())
    assert list(plan.replaced) == ["3", "4"] and plan.error is not None and plan.error < 1e-10
    model = model_of(copy.deepcopy(unfit), Block(), Block())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="within reach is params=0.600"):
        shrink(model, X, budget=Budget(params=0.4), granularity=Layer(min_keep=0))
    assert_untouched(model, state)


def test_a_latency_is_measured_on_copies_without_blocks(monkeypatch):
    """Here the clock is the number of weights, so that the test asks for no quiet machine; the rest is real."""
    model, calls = model_of(Block(scale=1e-3, skip=0.5), *map(Block, [4] * 6)), []
    before = params(model, X)

    def ratio(dense, small, precision):
        assert precision == 0.025
        calls.append([params(dense.module, X), params(small.module, X)])
        return calls[-1][1] / calls[-1][0]

    monkeypatch.setattr("lightning_prune.model.prices.latency_ratio", ratio)
    plan = shrink(model, X, budget=Budget(latency=0.66, tolerance=0.05), granularity=Layer())
    assert params(model, X) / before == pytest.approx(0.66, abs=0.05) and "2" not in plan.replaced
    assert all(dense == before and small <= before for dense, small in calls) and 1 < len(calls) < 6


def test_weights_that_are_shared_with_what_stays_do_not_count_as_gone():
    model = model_of(Block(), Block())
    model[2].body[0].weight = model[1].weight = nn.Parameter(torch.randn(4, 8)[:, :4].contiguous())
    model[0] = nn.Linear(4, 4, bias=False)
    call = call_of(model, X)
    couplings = trace(model, (X,))
    cost = cost_without(Budget(params=0.5), couplings, couplings.blocks, call)
    assert cost(["2"]) == (16 + 16 + 32) / (16 + 16 + 16 + 32) and cost([]) == 1.0


@given(
    drops=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12),
    fraction=st.floats(0.05, 0.95),
    tolerance=st.sampled_from([0.001, 0.02, 0.2]),
)
def test_it_is_the_nearest_of_all_numbers_or_none_is_near(drops, fraction, tolerance):
    budget, whole = Budget(params=fraction, tolerance=tolerance), sum(drops) + 0.1
    costs = [1 - sum(drops[:num]) / whole for num in range(len(drops) + 1)]
    nearest = min(abs(cost - fraction) for cost in costs)
    try:
        found = solve_depth(budget, costs.__getitem__, len(drops))
    except ValueError:
        assert nearest > tolerance
    else:
        assert abs(costs[found] - fraction) == nearest <= tolerance
