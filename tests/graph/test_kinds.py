"""Groups of one kind are built alike, whatever their modules are called."""

import pytest
import torch
from torch import nn

from lightning_prune import Channel, Isomorphic, shrink
from lightning_prune.graph import trace


class Block(nn.Module):
    def __init__(self, width, inner, names):
        super().__init__()
        self.names = names
        for name, layer in zip(names, (nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner)), strict=True):
            self.add_module(name, layer)
        self.out = nn.Conv2d(inner, width, 1)

    def forward(self, x):
        conv, norm = (self.get_submodule(name) for name in self.names)
        return x + self.out(norm(conv(x)).relu())


class Stages(nn.Module):
    """Two stages of other widths and names, and a hidden layer of another kind."""

    def __init__(self, first="layer1", second="deep", names=("conv", "norm")):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.add_module(first, nn.Sequential(Block(8, 6, names), Block(8, 10, names)))
        self.between = nn.Conv2d(8, 12, 1)
        self.add_module(second, Block(12, 20, ("a", "b")))
        self.order = (first, "between", second)
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        for name in self.order:
            x = self.get_submodule(name)(x)
        return self.head(self.hidden(x.mean((2, 3))).relu())


IMAGE = torch.zeros(2, 1, 8, 8)


def kinds(model, *inputs):
    return {name: group.kind for name, group in trace(model, inputs).groups.items()}


def test_repeated_layers_are_of_one_kind_in_stages_of_other_names_and_widths():
    found = kinds(Stages(), IMAGE)
    inner = [found[name] for name in ("layer1.0.conv.weight", "layer1.1.conv.weight", "deep.a.weight")]
    assert len(set(inner)) == 1
    others = [found[name] for name in ("stem.weight", "between.weight", "hidden.weight")]
    assert len({*inner, *others}) == 4


def test_names_of_modules_do_not_count():
    named, renamed = (kinds(Stages(*words), IMAGE) for words in ((), ("x", "y", ("p", "q"))))
    assert list(named.values()) == list(renamed.values()) and named.keys() != renamed.keys()


def sequential():
    """Convolutions and linear layers that differ in their numbers alone."""
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
    ]
    linears = [nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    return nn.Sequential(*convolutions, *linears).eval()


def test_unlike_parts_of_a_sequential_are_of_unlike_kinds():
    found = kinds(sequential(), IMAGE)
    assert found["0.weight"] == found["2.weight"]
    assert found["6.weight"] == found["8.weight"]
    assert len({found[name] for name in ("0.weight", "4.weight", "6.weight")}) == 3


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_kinds_do_not_compete(factor):
    """However large the weights of a kind are, half of each kind goes."""
    model = sequential()
    with torch.no_grad():
        for layer in model[6:9:2]:
            layer.weight *= factor
    shrink(model, IMAGE, 0.5, scope=Isomorphic(), granularity=Channel(multiple_of=1, normalize="none"))
    assert model[0].out_channels + model[2].out_channels == 8 and model[4].out_channels == 4
    assert model[6].out_features + model[8].out_features == 16
