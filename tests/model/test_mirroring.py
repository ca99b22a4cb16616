"""Plans that are mirrored on copies within the model."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune import Channel, shrink
from lightning_prune.graph import Plan, Scale
from lightning_prune.model.mirroring import counterparts, mirrored


def test_everything_of_a_plan_is_mirrored():
    plan = Plan(
        {"net.a": {0: (1,)}},
        {"net.a": (2,), "ema.a": (2,), "network.a": (2,)},
        attributes={"net": {"width": 1}, "network": {"width": 2}},
        scales=(Scale("net.a", 0, (1,), 2.0),),
        replaced={"net.block": "skip"},
    )
    found = mirrored(plan, {"ema.a": "net.a", "ema": "net", "ema.block": "net.block"})
    assert found.slices == {"net.a": {0: (1,)}, "ema.a": {0: (1,)}}
    assert found.attributes == {"net": {"width": 1}, "network": {"width": 2}, "ema": {"width": 1}}
    assert found.scales == (*plan.scales, Scale("ema.a", 0, (1,), 2.0))
    assert found.replaced == {"net.block": "skip", "ema.block": "skip"}
    assert mirrored(plan, {}) == plan


class Tied(nn.Module):
    """Its network shares a weight with what comes before it, by whose name the weight goes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
        self.net[0].weight = self.first.weight
        self.ema = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x) + self.first(x)[:, :4]


def test_a_weight_that_is_tied_has_a_counterpart_as_well():
    names = counterparts(model := Tied(), {"ema": "net"})
    assert names["ema.0.weight"] == "first.weight" and names["ema.0.bias"] == "net.0.bias"
    assert names["ema"] == "net" and names["ema.3"] == "net.3"
    shrink(model, torch.randn(3, 8), 0.5, granularity=Channel(multiple_of=1), copies=[model.ema])
    for average, own in zip(model.ema.parameters(), model.net.parameters(), strict=True):
        assert average.shape == own.shape
    assert model.net[2].out_features < 8


def test_what_a_copy_shares_with_its_original_is_cut_once():
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    ema = copy.deepcopy(net)
    ema[1].running_mean = net[1].running_mean
    model = nn.ModuleDict({"net": net, "ema": ema})
    assert "ema.1.running_mean" not in counterparts(model, {"ema": "net"})


class Contrasting(nn.Module):
    """As in MoCo, the keys are encoded by an average of what encodes the queries."""

    def __init__(self):
        super().__init__()
        self.query = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    def forward(self, x):
        return self.query(x)


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Contrasting()
        self.ema = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x):
        return self.net(x)


def test_a_copy_of_what_holds_a_copy_follows_the_innermost_original():
    model = Holding()
    shrink(
        model, torch.randn(3, 8), 0.5, granularity=Channel(multiple_of=1), copies=[model.ema, model.net.key]
    )
    shapes = [tuple(p.shape) for p in model.net.query.parameters()]
    assert shapes == [(8, 8), (8,), (4, 8), (4,)]
    for other in (model.net.key, model.ema.query, model.ema.key):
        assert [tuple(p.shape) for p in other.parameters()] == shapes


def test_structures_that_differ_are_no_pair():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    with pytest.raises(ValueError, match="zip"):
        counterparts(model, {"1": "0"})


def test_copies_that_lead_back_to_themselves_come_to_an_end():
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(1, 2))
    assert counterparts(model, {"0": "1", "1": "0"}).keys() == {
        "0",
        "1",
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    }
