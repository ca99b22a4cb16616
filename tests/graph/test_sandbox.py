"""Runs that leave no trace: containers, their contents, scripted parts, and who wants to run uncompiled."""

from __future__ import annotations

import random
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.graph import trace
from lightning_prune.graph.sandbox import attributes_kept, buffers_copied, eager


class Keeps(nn.Module):
    """A layer that adds to a list which others have too."""

    def __init__(self, losses):
        super().__init__()
        self.layer, self.losses = nn.Linear(2, 2), losses
        self.nested, self.last, self.counts, self.seen = (
            {"train": []},
            deque(maxlen=2),
            defaultdict(int),
            set(),
        )
        self.num, self.cache = 0, None
        self.register_buffer("state", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.losses.append(float(x.detach().sum()))
        self.nested["train"].append(1)
        self.last.append(len(self.losses))
        self.counts["calls"] += 1
        self.seen.add(len(self.losses))
        self.num, self.cache, self.state = self.num + 1, x, x[0]
        return self.layer(x)


def test_what_layers_share_is_shared_in_a_run_and_comes_back():
    losses = []
    net = nn.Sequential(Keeps(losses), Keeps(losses))
    net(torch.ones(3, 2))
    before = [(m.num, m.cache, list(m.last), dict(m.counts), set(m.seen), m.state) for m in net]
    contents = [*losses]
    with attributes_kept(net), torch.no_grad():
        net(torch.zeros(3, 2))
        assert len(losses) == 4 and net[0].losses is net[1].losses is losses
    assert losses == contents and net[0].losses is losses and net[0].nested == {"train": [1]}
    after = [(m.num, m.cache, list(m.last), dict(m.counts), set(m.seen), m.state) for m in net]
    assert all(
        a is b or a == b
        for old, new in zip(before, after, strict=True)
        for a, b in zip(old, new, strict=True)
    )
    assert net[0].last.maxlen == 2 and type(net[0].counts) is defaultdict


class Hooked(nn.Module):
    """Sets a hook on its layer in its first call, as models do that collect hidden states; counts what runs."""

    def __init__(self, generator):
        super().__init__()
        self.layer, self.is_ready, self.generator = nn.Linear(2, 2), False, generator
        self.calls = 0

    def forward(self, x):
        if not self.is_ready:
            self.layer.register_forward_hook(self.count)
            self.layer.register_full_backward_pre_hook(lambda *_: None)
            self.is_ready = True
        return self.layer(x)

    def count(self, *_):
        self.calls += 1


def test_hooks_that_a_run_sets_are_gone_with_what_remembers_them():
    net = Hooked(None)
    for _ in range(3):
        with attributes_kept(net), torch.no_grad():
            net(torch.ones(1, 2))
            assert net.calls == 1
    net(torch.ones(1, 2))
    assert net.calls == 1 and len(net.layer._forward_hooks) == 1 and len(net.layer._backward_pre_hooks) == 1


def test_hooks_of_before_stay_and_those_that_a_run_removes_come_back():
    net, calls = nn.Linear(2, 2), []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    with attributes_kept(net):
        net(torch.ones(1, 2))
        handle.remove()
    net(torch.ones(1, 2))
    handle.remove()
    net(torch.ones(1, 2))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (torch.Generator, lambda g: torch.rand(3, generator=g).tolist()),
        (random.Random, lambda g: g.random()),
        (np.random.default_rng, lambda g: g.random()),
        (np.random.RandomState, lambda g: g.rand()),
    ],
    ids=["torch", "python", "numpy", "legacy"],
)
def test_generators_that_a_module_owns_go_on_from_where_they_were(make, draw):
    net = Hooked(make())
    others = nn.Sequential(Hooked({"nested": [net.generator]}), net)
    draw(net.generator)
    with attributes_kept(others):
        first = draw(net.generator)
        draw(net.generator)
    assert draw(net.generator) == first != draw(net.generator)


def test_buffers_are_written_into_copies_which_a_backward_pass_can_still_read():
    net = nn.Module()
    net.register_buffer("center", torch.ones(2))
    net.register_buffer("nothing", None)
    net.twin = nn.Module()
    net.twin.register_buffer("center", net.center)
    weight, center = torch.tensor([2.0, 3.0], requires_grad=True), net.center
    with buffers_copied(net.modules()):
        net.center.mul_(5.0)
        assert net.twin.center is net.center is not center and net.nothing is None
        loss = (weight * net.center).sum()
    loss.backward()
    assert net.center is net.twin.center is center and center.tolist() == [1.0, 1.0]
    assert weight.grad.tolist() == [5.0, 5.0]


def test_attributes_that_a_run_makes_are_gone():
    net = nn.Linear(2, 2)
    with attributes_kept(net):
        net.made = [1]
    assert not hasattr(net, "made")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_lazy_and_scripted_modules_are_left_to_themselves():
    net = nn.Sequential(nn.LazyLinear(3), torch.jit.script(nn.BatchNorm1d(3)))
    with attributes_kept(net):
        net(torch.randn(4, 2))
    assert net[0].in_features == 2 and net(torch.randn(4, 2)).shape == (4, 3)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="this torch has no stance")
def test_those_who_want_to_run_uncompiled_may_leave_in_any_order():
    def is_eager():
        runs = []
        compiled = torch.compile(lambda x: x + 1, backend=lambda graph, _: runs.append(1) or graph.forward)
        compiled(torch.ones(1))
        torch._dynamo.reset()
        return not runs

    first, second = eager(), eager()
    first.__enter__()
    second.__enter__()
    assert is_eager()
    first.__exit__(None, None, None)
    assert is_eager()
    second.__exit__(None, None, None)
    assert not is_eager()


class ReadsValues(nn.Module):
    """Reads a value of its input, which fake tensors have none of."""

    def forward(self, x):
        return x * 2 if float(x.detach().mean()) > 0 else x


@pytest.mark.parametrize("also", [nn.ReLU(), ReadsValues()], ids=["fake", "real"])
def test_tracing_in_training_mode_counts_no_batches(also):
    """Nor does a plan, which is tried out with other sizes; channels of the batch norm are seen in both ways."""
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), also, nn.Linear(16, 4))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    couplings = trace(net, (torch.randn(4, 8),), training=True)
    couplings.plan({"0.weight": torch.arange(16) < 8})
    assert [group.size for group in couplings.groups.values()] == [16]
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name
