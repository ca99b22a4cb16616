"""Laws of a pruner over any sequence of updates."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import ERK, LAMP, Global, Local, Magnitude, PerRow, Random, Slice, Weight
from lightning_prune.core.recipe import Recipe
from lightning_prune.model.pruning import Pruner

SCOPES = st.sampled_from([Global(), Local(), LAMP(), ERK(), PerRow()])
NOUNS = st.one_of(
    st.tuples(st.sampled_from([Magnitude(), Random(1)]), st.just(Weight()), SCOPES),
    st.tuples(st.just(Magnitude()), st.just(Slice(0)), st.sampled_from([Global(), Local()])),
)
RISE = st.lists(st.floats(0, 1), min_size=1, max_size=5).map(sorted)


def num_kept(pruner):
    """Groups that are left, all where there is no mask."""
    return sum(int((pruner.granularity.reduce(mask.float()) > 0).sum()) for mask in pruner.masks.values())


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Conv1d(16, 8, 1), nn.Linear(8, 5))


@settings(max_examples=60, deadline=None)
@given(nouns=NOUNS, rise=RISE, sparsity=st.floats(0.05, 0.9), seed=st.integers(0, 5))
def test_masks_are_nested_and_exact_along_any_rise(nouns, rise, sparsity, seed):
    criterion, granularity, scope = nouns
    pruner = Pruner(model := network(seed), Recipe(sparsity, criterion, granularity, scope))
    dense = copy.deepcopy(model.state_dict())
    before = {name: torch.ones(shape, dtype=torch.bool) for name, shape in pruner.shapes.items()}
    draw = torch.Generator().manual_seed(seed)
    for fraction in rise:
        pruner.update_(fraction)
        for name, mask in pruner.masks.items():
            weight = model.get_parameter(name)
            assert not (mask & ~before[name]).any(), "something has come back"
            assert torch.equal(weight.detach() != 0, mask), "a mask is what is not zero"
            with torch.no_grad():  # training moves what is kept
                weight += torch.randn(weight.shape, generator=draw) * mask
        fresh = Pruner(network(seed), Recipe(sparsity, criterion, granularity, scope))
        fresh.update_(fraction)
        assert num_kept(pruner) == num_kept(fresh), "as many as of a dense model"
        before = dict(pruner.masks) or before
    others = [name for name in dense if name not in pruner.targets]
    assert all(torch.equal(dense[name], model.state_dict()[name]) for name in others)


@settings(max_examples=30, deadline=None)
@given(
    nouns=NOUNS,
    sparsity=st.floats(0.1, 0.9),
    fractions=st.tuples(st.floats(0.1, 1), st.floats(0, 1)),
    seed=st.integers(0, 5),
)
def test_a_state_goes_on_as_the_pruner_that_it_was_saved_from(nouns, sparsity, fractions, seed):
    criterion, granularity, scope = nouns
    recipe = Recipe(sparsity, criterion, granularity, scope)
    first = Pruner(model := network(seed), recipe)
    first.update_(fractions[0])
    second = Pruner(copy.deepcopy(model), recipe)
    second.load_state_dict(first.state_dict())
    for pruner in (first, second):
        pruner.update_(fractions[1])
    assert first.masks.keys() == second.masks.keys()
    assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())
