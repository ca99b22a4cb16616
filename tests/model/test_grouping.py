"""From scores of weights to a choice among coupled groups, against sums written out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import Channel, Global, Head, Isomorphic, Local
from lightning_prune.core.types import GroupScores
from lightning_prune.graph import trace
from lightning_prune.model.grouping import allowed, candidates, count, keep, score_groups, without


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.num_heads = nn.Linear(6, 36, bias=False), nn.Linear(12, 5, bias=False), 3

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.out((q @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def choose(scores, sparsity, **nouns):
    return keep(scores, count(scores, sparsity, **nouns))


def scored(model, x, granularity, **settings):
    torch.manual_seed(0)
    couplings = trace(model, (x,))
    scores = {n: torch.rand_like(p) for n, p in model.named_parameters() if p.dim() > 1}
    groups = candidates(couplings, granularity, scores, {})
    return groups, scores, score_groups(groups, scores, granularity)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_a_neuron_is_scored_by_all_weights_that_write_or_read_it(reduction):
    _, scores, found = scored(mlp(), torch.zeros(2, 4), Channel(reduction=reduction, normalize="none"))
    for i in range(6):
        mine = torch.cat([scores["0.weight"][i], scores["2.weight"][:, i]]).double()
        expected = {"mean": mine.mean(), "sum": mine.sum(), "max": mine.max()}[reduction]
        assert found["0.weight"][i] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("heads", ["whole", "dim"])
def test_a_head_is_scored_by_its_rows_and_columns(heads):
    _, scores, found = scored(Attention(), torch.zeros(2, 4, 6), Channel(heads=heads, normalize="none"))
    grid = scores["qkv.weight"].view(3, 3, 4, 6)  # which, head, dim, input
    columns = scores["out.weight"].view(5, 3, 4)
    name = "qkv.weight[head]" if heads == "whole" else "qkv.weight[head_dim]"
    assert list(found) == [name]
    for i, score in enumerate(found[name]):
        mine = [grid[:, i], columns[:, i]] if heads == "whole" else [grid[:, :, i], columns[:, :, i]]
        assert score == pytest.approx(float(torch.cat([m.flatten() for m in mine]).double().mean()), rel=1e-6)


@pytest.mark.parametrize(("how", "unit"), [("mean", torch.mean), ("max", torch.max)])
def test_groups_of_unlike_scale_are_made_alike(how, unit):
    _, _, found = scored(mlp(), torch.zeros(2, 4), Channel(normalize=how))
    assert float(unit(found["0.weight"])) == pytest.approx(1.0)


def test_what_is_protected_keeps_its_outputs_and_follows_with_its_inputs():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3))
    couplings = trace(model, (torch.zeros(2, 4),))
    names = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert set(candidates(couplings, Channel(), names, {"1.weight": {0}})) == {"0.weight"}
    assert set(candidates(couplings, Channel(), {"0.bias"}, {})) == {"0.weight"}
    assert candidates(couplings, Head(), names, {}) == {}


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    sparsity=st.floats(0.0, 0.95),
    step=st.sampled_from([1, 4, 8]),
    scope=st.sampled_from([Local(), Global(min_keep=0), Isomorphic(min_keep=0)]),
    seed=st.integers(0, 99),
)
def test_the_best_are_kept_in_numbers_that_are_allowed(sizes, sparsity, step, scope, seed):
    draw = torch.Generator().manual_seed(seed)
    raw = {f"g.{i}": (torch.rand(n, generator=draw) * 4).round() for i, n in enumerate(sizes)}
    granularity = Channel(multiple_of=step)
    choice = choose(GroupScores(raw, dict.fromkeys(raw, "g")), sparsity, granularity=granularity, scope=scope)
    for name, scores in raw.items():
        size, kept = len(scores), int(choice[name].sum())
        assert kept >= 1 and (kept % granularity.step(size) == 0 or kept == size)
        order = sorted(range(size), key=lambda i: (-float(scores[i]), i))
        assert sorted(order[:kept]) == choice[name].nonzero().flatten().tolist()


def test_tied_groups_keep_equally_many():
    scores = GroupScores({"a": torch.arange(8.0), "b": torch.arange(8.0) * 9}, {"a": "x", "b": "y"})
    free = choose(scores, 0.5, granularity=Channel(), scope=Global())
    tied = choose(scores, 0.5, granularity=Channel(), scope=Global(), ties=[("a", "b")])
    assert int(free["a"].sum()) != int(free["b"].sum())
    assert int(tied["a"].sum()) == int(tied["b"].sum()) == 4


@given(count=st.integers(0, 99), size=st.integers(1, 99), step=st.integers(1, 16), least=st.integers(0, 9))
def test_the_nearest_allowed_number(count, size, step, least):
    granularity = Channel(multiple_of=step, min_keep=least)
    found, unit = allowed(min(count, size), size, granularity), granularity.step(size)
    possible = [
        n for n in range(1, size + 1) if (n % unit == 0 or n == size) and n >= min(max(least, 1), size)
    ]
    assert found in possible
    assert abs(found - min(count, size)) <= min(abs(n - min(count, size)) for n in possible) + unit - 1
    assert math.isfinite(found)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("normalize", ["mean", "max"])
@pytest.mark.parametrize("gone", [[0, 1], [5], []])
def test_what_was_cut_ranks_as_what_is_zero(reduction, normalize, gone):
    """A model that was cut and one that is masked are alike to the contest: so they lose the same channels next."""
    granularity = Channel(reduction=reduction, normalize=normalize)
    groups, scores, _ = scored(mlp(), torch.zeros(2, 4), granularity)
    left = [i for i in range(6) if i not in gone]
    masked = {n: s.clone() for n, s in scores.items()}
    masked["0.weight"][gone] = masked["2.weight"][:, gone] = 0
    small = nn.Sequential(nn.Linear(4, len(left)), nn.ReLU(), nn.Linear(len(left), 3))
    cut = {"0.weight": scores["0.weight"][left], "2.weight": scores["2.weight"][:, left]}
    small_groups = candidates(trace(small, (torch.zeros(2, 4),)), granularity, cut, {})
    first = score_groups(groups, masked, granularity)["0.weight"]
    second = score_groups(small_groups, cut, granularity, {"0.weight": 6})["0.weight"]
    torch.testing.assert_close(second[: len(left)], first[left])
    assert bool((second[len(left) :] == -math.inf).all())


def test_what_is_gone_stays_gone_whatever_number_is_asked_for():
    scores = GroupScores({"a": torch.tensor([5.0, 1.0, 3.0, 4.0])}, {"a": "x"})
    small = without(scores, {"a": torch.tensor([False, True, True])})  # the last was cut before
    assert keep(small, {"a": 1})["a"].tolist() == [False, False, True, False]
    assert keep(small, {"a": 4})["a"].tolist() == [False, True, True, False]


def test_outputs_along_another_dim_are_protected_too():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    couplings = trace(model, (torch.zeros(2, 3, 4, 4),))
    names = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert set(candidates(couplings, Channel(), names, {})) == {"0.weight", "2.weight"}
    assert set(candidates(couplings, Channel(), names, {"0.weight": {1}})) == {"2.weight"}
