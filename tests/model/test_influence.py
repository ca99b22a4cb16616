"""Block influence against the formula in numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import Layer, shrink
from lightning_prune.examples.networks import GPT, ResNet20
from lightning_prune.graph import trace
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.influence import Influence, feature_dim


def formula(x, y, dim):
    x, y = (t.detach().double().numpy() for t in (x, y))
    return 1 - (x * y).sum(dim) / np.sqrt((x**2).sum(dim) * (y**2).sum(dim))


@pytest.mark.parametrize(
    ("make", "path", "x", "dim"),
    [
        (lambda: GPT(vocab_size=11), "blocks.1", torch.arange(64).view(4, 16) % 11, -1),
        (ResNet20, "blocks.1", torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 1),
    ],
)
def test_it_is_one_minus_the_mean_cosine_over_all_batches(make, path, x, dim):
    torch.manual_seed(0)
    model, seen = make().eval(), {}
    hook = model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    model(x)
    hook.remove()
    blocks = trace(model, (x,)).blocks
    found = Influence(model, {path: blocks[path]}, [model])
    calibrate(found, model, [x[:1], x[1:]])  # of unlike size: each position counts once
    assert found.influence()[path] == pytest.approx(formula(seen["x"], seen["y"], dim).mean(), abs=1e-9)
    found.clear()
    assert found.influence() == {}


def test_of_a_branch_it_is_how_the_stream_turns():
    torch.manual_seed(0)
    model, x, seen = GPT(vocab_size=11).eval(), torch.arange(64).view(4, 16) % 11, {}
    block = model.blocks[1]
    block.register_forward_hook(lambda _, args, out: seen.update(stream=args[0]))
    block.attention.register_forward_hook(lambda _, args, out: seen.update(branch=out))
    model(x)
    expected = formula(seen["stream"], seen["stream"] + seen["branch"], -1).mean()
    branches = trace(model, (x,)).branches
    assert list(branches) == [f"blocks.{i}.attention" for i in range(4)]
    found = Influence(model, branches, [model])
    calibrate(found, model, [x[:1], x[1:]])
    assert expected > 1e-6 and found.influence()["blocks.1.attention"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("block", "shape", "dim"),
    [
        (nn.Linear(8, 8), (2, 5, 5, 8), -1),  # channels last, as in Swin
        (nn.Conv2d(8, 8, 1), (2, 8, 5, 5), 1),
        (nn.Sequential(nn.BatchNorm2d(8)), (2, 8, 5, 5), 1),
        (nn.Conv1d(8, 8, 1), (2, 8, 5), 1),
        (nn.Conv1d(8, 8, 1), (2, 5, 8), -1),  # within a transformer, transposed inside
        (nn.LayerNorm(8), (2, 5, 8), -1),
    ],
)
def test_where_features_lie(block, shape, dim):
    assert feature_dim(block, torch.zeros(shape)) == dim


def test_calibration_data_decides_which_block_goes():
    """The first block turns where x is positive, the second where it is negative."""

    class Turn(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign, self.weight = sign, nn.Parameter(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))

        def forward(self, x):
            return x + (self.sign * x).relu() @ self.weight

    model = nn.Sequential(Turn(1.0), Turn(-1.0), nn.Linear(2, 1))
    x = torch.ones(3, 2)
    for sign, gone in ((1.0, "1"), (-1.0, "0")):
        by_data = shrink(copy.deepcopy(model), -sign * x, 0.5, granularity=Layer(), batches=[sign * x])
        by_example = shrink(copy.deepcopy(model), sign * x, 0.5, granularity=Layer())
        assert by_data.replaced == by_example.replaced == {gone: "skip"}
