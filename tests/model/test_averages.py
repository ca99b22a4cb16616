"""Averages within a model: which submodules they are, and plans that are mirrored on them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_prune import Channel, Head
from lightning_prune.core.recipe import Recipe
from lightning_prune.graph import Plan, Scale, trace
from lightning_prune.model.averages import Copies, mirrored
from lightning_prune.model.calls import Call
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.surgery import execute_


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0])


class Holder(nn.Module):
    """Runs its network; `more` are submodules beside it."""

    def __init__(self, net, **more):
        super().__init__()
        self.net = net
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.net(x)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def move_(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("make", "granularity", "x"),
    [(mlp, Channel(multiple_of=1), torch.randn(3, 8)), (Attending, Head(), torch.randn(3, 5, 16))],
    ids=["channels", "heads"],
)
def test_an_average_becomes_what_the_network_becomes(make, granularity, x):
    net = make()
    model = Holder(net, ema=copy.deepcopy(net))
    pruner = GroupPruner(model, Recipe(0.5, granularity=granularity), Call(model, (x,), {}))
    pruner.copies = Copies(model, pruner.couplings)
    move_(model.ema)
    alone = Holder(copy.deepcopy(model.ema))
    pruner.update_(1.0)
    plan = pruner.shrink_()
    own = {name: dims for name, dims in plan.slices.items() if name.startswith("net.")}
    parts = {
        part: {p: v for p, v in getattr(plan, part).items() if p.startswith("net")}
        for part in ("attributes", "replaced", "shapes")
    }
    execute_(alone, replace(plan, slices=own, **parts))
    assert own and type(model.ema) is type(alone.net)
    torch.testing.assert_close(model.ema.eval()(x), alone.net.eval()(x), rtol=0, atol=0)
    for name, tensor in alone.net.state_dict().items():
        assert torch.equal(model.ema.state_dict()[name], tensor)


def test_everything_of_a_plan_is_mirrored():
    plan = Plan(
        {"net.a": {0: (1,)}},
        {"net.a": (2,), "ema.a": (2,), "network.a": (2,)},
        attributes={"net": {"width": 1}, "network": {"width": 2}},
        scales=(Scale("net.a", 0, (1,), 2.0),),
        replaced={"net.block": "skip"},
    )
    found = mirrored(plan, {"ema": "net"})
    assert found.slices == {"net.a": {0: (1,)}, "ema.a": {0: (1,)}}
    assert found.attributes == {"net": {"width": 1}, "network": {"width": 2}, "ema": {"width": 1}}
    assert found.scales == (*plan.scales, Scale("ema.a", 0, (1,), 2.0))
    assert found.replaced == {"net.block": "skip", "ema.block": "skip"}
    assert mirrored(plan, {}) == plan


def watched(**more):
    torch.manual_seed(0)
    net = mlp()
    model = Holder(net, **{name: make(net) for name, make in more.items()})
    return model, Copies(model, trace(model, (torch.randn(3, 8),)))


@pytest.mark.parametrize(
    ("make", "is_suspect"),
    [
        (copy.deepcopy, True),
        (lambda net: mlp(), True),  # an average that was loaded
        (lambda net: nn.Linear(8, 16), False),  # a layer that happens to have the sizes of another one
        (lambda net: copy.deepcopy(net[0]), True),
        (lambda net: net, False),  # the same parameters under another name
        (lambda net: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)), False),
    ],
)
def test_what_may_be_an_average(make, is_suspect):
    _, copies = watched(other=make)
    assert ("other" in copies.suspects) == is_suspect


def test_norms_at_their_first_values_tell_nothing():
    model, copies = watched(norm=lambda net: nn.BatchNorm1d(16))
    copies.staying(Plan({"net.1.weight": {0: (0,)}}, {"net.1.weight": (16,)}))
    assert not copies.suspects["norm"].is_equal
    move_(model.norm)
    assert copies.averages() == {"norm": "net.1"}


def test_an_average_is_what_changes_without_gradients():
    model, copies = watched(ema=copy.deepcopy, teacher=copy.deepcopy, twin=lambda net: mlp())
    model.twin(torch.randn(3, 8)).sum().backward()
    copies.note_gradients()
    assert copies.averages() == {} and list(copies.suspects) == ["ema", "teacher"]
    move_(model.ema)
    assert copies.averages() == {"ema": "net"}


def test_where_it_is_not_clear_what_is_averaged_that_is_said():
    model, copies = watched(ema=lambda net: mlp(), twin=lambda net: mlp())
    model.twin(torch.randn(3, 8)).sum().backward()
    copies.note_gradients()
    copies.check()
    move_(model.ema)
    with pytest.raises(ValueError, match="`ema` is built as net, twin and changes without gradients"):
        copies.averages()


def test_a_state_is_restored():
    model, copies = watched(ema=copy.deepcopy)
    state = copies.state_dict()
    move_(model.ema)
    again = Copies(model, trace(model, (torch.randn(3, 8),)))
    assert again.averages() == {}
    again.load_state_dict(state)
    assert again.averages() == {"ema": "net"}
