"""Submodules that are built alike: near or equal values, on whatever device and of whatever dtype."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.model.lookalikes import are_equal, are_near, families, is_averaged, total


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))


def squares(one, other):
    """Return the squares of the distance of the weights, and of the length of the other's, by numpy."""
    a, b = (
        np.concatenate([m[i].weight.detach().double().numpy().ravel() for i in (0, 2)]) for m in (one, other)
    )
    return ((a - b) ** 2).sum(), (b**2).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_is_what_has_the_same_values_in_whatever_precision(dtype):
    one = net().to(torch.bfloat16)
    assert are_equal(one, copy.deepcopy(one).to(dtype)) and are_equal(copy.deepcopy(one).to(dtype), one)
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[2].bias[0] += 1
    assert not are_equal(one, other.to(dtype))


@pytest.mark.parametrize(("share", "expected"), [(0.0, True), (0.3, True), (0.6, True), (1.0, False)])
def test_near_is_what_is_nearer_than_zero_is(share, expected):
    """A mixture of weights with others that were drawn apart; at last, those others alone."""
    one, other = net(), net(1)
    mixed = copy.deepcopy(one)
    with torch.no_grad():
        for mine, its in zip(mixed.parameters(), other.parameters(), strict=True):
            mine.lerp_(its, share)
    distance, own = squares(mixed, one)
    assert are_near(mixed, one) is expected is bool(distance < own)


def test_norms_alone_are_near_to_nothing():
    assert are_equal(nn.BatchNorm1d(4), nn.BatchNorm1d(4)) and not are_near(
        nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    )


def test_families_are_built_alike_and_name_what_contains_others_first():
    model = nn.ModuleDict({"net": net(), "other": nn.Linear(8, 16), "ema": net(1)})
    assert list(families(model)) == [
        "net",
        "net.0",
        "net.1",
        "net.2",
        "other",
        "ema",
        "ema.0",
        "ema.1",
        "ema.2",
    ]
    assert families(model)["other"] == ["net.0", "other", "ema.0"]


def test_an_averaged_model_of_torch_is_an_average():
    model = nn.ModuleDict({"net": net(), "ema": AveragedModel(net())})
    assert is_averaged(model, "ema.module.0") and is_averaged(model, "ema")
    assert not is_averaged(model, "net.0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
def test_a_total_shows_a_bit(dtype):
    module = nn.Linear(3, 2, dtype=dtype)
    before = total(module)
    with torch.no_grad():
        module.weight[1, 2] *= 1 + 2 * torch.finfo(dtype).eps
    assert total(module) != before
