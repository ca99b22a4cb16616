"""What only surgery changes, and what only some modes or inputs read: the small model is still the masked one."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import Channel, Global, Local, shrink
from lightning_prune.core.recipe import Recipe
from lightning_prune.graph import couplings, trace
from lightning_prune.model import survivors
from lightning_prune.model.calls import Call
from lightning_prune.model.contest import Contest

ONE = Channel(multiple_of=1)


def masked(dense: nn.Module, plan) -> nn.Module:
    """The dense model with zeros where slices are cut, by hand."""
    model = copy.deepcopy(dense)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, dims in plan.slices.items():
            for dim, kept in dims.items():
                gone = sorted(set(range(plan.shapes[name][dim])) - set(kept))
                tensors[name].index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)
    return model


class Net(nn.Module):
    """Layers whose own sizes the code reads in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.table = way, nn.Embedding(50, 32)
        self.a, self.b, self.out = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        if self.way == "embedding":
            return self.out(self.table(x) * math.sqrt(self.table.embedding_dim))
        y = self.a(x)
        if self.way == "branch" and self.a.in_features == self.a.out_features:
            y = y + x
        y = self.b(y).relu()
        if self.way == "mean":
            return self.out(y / self.out.in_features)
        if self.way == "power":
            return self.out(y) * self.out.in_features**-0.5
        if self.way == "python":
            return self.out(y) * float(str(self.b.out_features))
        if self.way == "attention":
            k = self.a(x)
            return self.out((self.b(k) @ k.T / math.sqrt(self.b.out_features)).softmax(-1) @ k)
        return self.out(y)


@pytest.mark.parametrize(
    ("way", "num_groups"),
    [
        ("embedding", 1),
        ("mean", 2),
        ("power", 2),
        ("attention", 1),
        ("branch", 2),
        ("python", 1),  # no trace shows where the number comes from: what it is the size of stays whole
    ],
)
def test_sizes_that_modules_keep_count_as_the_small_model_has_them(way, num_groups):
    torch.manual_seed(0)
    example = torch.randint(50, (3, 7)) if way == "embedding" else torch.randn(6, 8, dtype=torch.float64)
    dense = Net(way).double().eval()
    small = copy.deepcopy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = shrink(small, example, 0.75 if way == "branch" else 0.5, granularity=ONE)
    with torch.no_grad():
        torch.testing.assert_close(small(example), masked(dense, plan)(example), rtol=1e-10, atol=1e-12)
    assert len([1 for size, kept in plan.groups.values() if kept < size]) == num_groups


class Depthwise(nn.Module):
    """Reads the size of a convolution of as many groups as channels, which follows from both."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        kind = nn.ConvTranspose2d if is_transposed else nn.Conv2d
        self.a, self.b = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1)
        self.depthwise = kind(32, 32, 3, padding=1, groups=32)
        self.weight = 0.5  # of no layer

    def forward(self, x):
        y = self.depthwise(self.a(x).relu()).relu()
        size = self.depthwise.in_channels, self.depthwise.out_channels
        return self.b(y.reshape(len(x), size[0], *x.shape[2:]) + torch.zeros(size[1], 1, 1)) * self.weight


class Own(nn.Linear):
    """A layer whose size is no attribute but what its weight says."""

    @property
    def in_features(self):
        return self.weight.shape[1]

    @in_features.setter
    def in_features(self, value):
        pass


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Depthwise(False), torch.randn(2, 3, 6, 6)),
        (Depthwise(True), torch.randn(2, 3, 6, 6)),
        (nn.Sequential(Own(8, 32), nn.ReLU(), Own(32, 32), nn.ReLU(), Own(32, 4)), torch.randn(5, 8)),
    ],
    ids=["depthwise", "depthwise, transposed", "a property"],
)
def test_sizes_that_follow_from_others_keep_nothing_from_being_pruned(model, example):
    dense = copy.deepcopy(model.eval())
    plan = shrink(model, example, 0.5, granularity=ONE)
    assert all(kept < size for size, kept in plan.groups.values())
    torch.testing.assert_close(model(example), masked(dense, plan)(example), rtol=1e-4, atol=1e-5)


class Noisy(nn.Module):
    """Noise on weights while training: Fortunato et al. 2017 (arXiv:1706.10295)."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.randn(num_outputs, num_inputs))
        self.sigma = nn.Parameter(torch.full((num_outputs, num_inputs), 0.02))

    def forward(self, x):
        weight = self.mu + self.sigma * torch.randn_like(self.sigma) if self.training else self.mu
        return F.linear(x, weight)


def test_what_is_read_in_training_alone_becomes_smaller_too():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Noisy(16, 16), nn.ReLU(), nn.Linear(16, 3))
    shrink(model, torch.randn(4, 6), 0.5, granularity=ONE)
    assert model[2].sigma.shape == model[2].mu.shape and model[2].mu.numel() < 256
    for training in (True, False):
        assert model.train(training)(torch.randn(5, 6)).shape == (5, 3)


def test_a_run_in_training_mode_is_not_taken_where_it_shows_less():
    class Fewer(Noisy):
        def forward(self, x):
            return F.linear(x, self.sigma) if self.training else F.linear(x, self.mu)

    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Fewer(16, 3))
    assert trace(net, (torch.randn(4, 6),)).run.training is False


def test_statistics_of_channels_are_told_apart_by_the_same_operations_that_a_masked_run_changes():
    """Batch norms are left out: theirs are of each channel by itself."""
    assert survivors._OVER_SURVIVORS.keys() - couplings.NORMS == {"native_batch_norm"}
    assert survivors._OVER_SURVIVORS.keys() >= couplings.NORMS


class Heads(nn.Module):
    """Attention whose number of heads is written into the code, so that heads cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.q, self.k, self.v = (nn.Linear(n, 32) for n in (6, 32, 32, 32))
        self.o, self.out = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.inner(x)
        q, k, v = (f(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(x + self.o(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("heads", ["keep", "whole", "dim"])
def test_heads_that_cannot_go_are_heads_still(heads):
    model, example = Heads(), torch.randn(2, 5, 6)
    assert {g.role for g in trace(model, (example,)).groups.values()} == {"channel", "head_dim"}
    shrink(model, example, 0.5, granularity=Channel(multiple_of=1, heads=heads))
    assert model.inner.out_features < 32
    assert (model.q.out_features < 32) is (model.v.out_features < 32) is (heads == "dim")


class Router(nn.Module):
    """Each token goes to two of four experts, which ones follows from values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.out = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(4)
        )

    def forward(self, x):
        x = self.inner(x)
        weights, places = self.gate(x).softmax(-1).topk(2, -1)
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, which = (places == number).nonzero(as_tuple=True)
            if len(rows):
                found = found.index_add(0, rows, expert(x[rows]) * weights[rows, which, None])
        return self.out(found)


@pytest.mark.parametrize("scope", [Global(), Local()], ids=str)
def test_what_is_left_of_groups_that_are_seen_no_more_is_not_cut_again(scope):
    net = nn.Sequential(
        nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 3)
    )
    found = trace(net, (torch.randn(2, 8),))
    call = Call(net, (torch.randn(2, 8),), {})
    scored = {name: tuple(p.shape) for name, p in net.named_parameters() if p.dim() > 1}
    contest = Contest(Recipe(0.5, granularity=ONE, scope=scope), found, call, scored, {})
    contest.groups = {name: group for name, group in contest.groups.items() if name != "2.weight"}
    contest.left = {"2.weight": 16}
    weights = {name: torch.rand(shape) for name, shape in scored.items()}
    choice = contest.choose(contest.scores(weights), 1.0)
    counts = contest.counts(choice)
    assert counts["2.weight"] == 16 and "2.weight" not in choice
    if scope == Global():
        assert sum(counts.values()) == 30  # of 60, from the others alone
    else:
        assert counts["0.weight"] == counts["4.weight"] == 10


@pytest.mark.parametrize("seed", range(12))
def test_tokens_that_go_elsewhere_once_it_is_pruned_end_in_no_crash(seed):
    torch.manual_seed(seed)
    model, example = Router().eval(), torch.randn(2, 8)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan, error = None, ""
        try:
            plan = shrink(model, example, 0.5, granularity=ONE)
        except ValueError as found:
            error = str(found)
    if plan is None:
        after = model.state_dict()
        assert "finds nothing to prune" in error and all(torch.equal(before[n], after[n]) for n in before)
        return
    gone = sum(size - kept for size, kept in plan.groups.values() if kept < size)
    total = sum(size for size, _ in plan.groups.values())
    assert gone / total == pytest.approx(0.5, abs=0.01)
    assert not [w for w in said if "is missed" in str(w.message)]
