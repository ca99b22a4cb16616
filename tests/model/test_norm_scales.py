"""Batch-norm scales: which norm is behind which layer, and network slimming by them."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import (
    APoZ,
    BatchNormScale,
    Channel,
    GeometricMedian,
    MeanActivation,
    Slice,
    prune,
    shrink,
)
from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.recipe import Recipe
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.calls import Call
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.grouping import _normalised
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.statistics import Statistics
from lightning_prune.model.targets import select_targets


class Residual(nn.Module):
    """Norms are made in another order than they run; two of them write the same channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(8) for name in ("second", "first", "stem")})
        self.stem, self.first, self.second = (nn.Conv2d(c, 8, 3, padding=1, bias=False) for c in (3, 8, 8))
        self.head = nn.Linear(8, 5)
        for i, norm in enumerate(self.norms.values()):
            nn.init.uniform_(norm.weight, -1.0 - i, 1.0 + i)

    def forward(self, x):
        x = F.relu(self.norms["stem"](self.stem(x)))
        y = F.relu(self.norms["first"](self.first(x)))
        x = F.relu(x + self.norms["second"](self.second(y)))
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_each_layer_is_given_the_norm_that_reads_it():
    model = Residual()
    targets = select_targets(model, exclude=["head"])
    statistics = Statistics(model, targets, ["norm_scale"])
    with statistics.watch():
        model(IMAGES)
    for name, stats in statistics.read().items():
        expected = model.norms[name.split(".")[0]].weight.detach().abs()
        assert torch.equal(stats["norm_scale"], expected.view(-1, 1, 1, 1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_rows_go_by_the_scale_over_the_whole_network():
    model = Residual()
    scales = torch.cat([model.norms[n].weight.detach().abs() for n in ("stem", "first", "second")])
    masks = prune(
        model, 0.5, criterion=BatchNormScale(), granularity=Slice(dim=0), exclude=["head"], batches=[IMAGES]
    )
    kept = torch.cat([m.flatten(1).all(1) for m in masks.values()])
    assert torch.equal(kept, scales >= scales.sort(descending=True).values[11])


def test_what_has_no_norm_is_refused_by_name():
    with pytest.raises(
        ValueError, match="`head.weight` has no `norm_scale`: no batch norm with a scale reads"
    ):
        prune(Residual(), 0.5, criterion=BatchNormScale(), granularity=Slice(dim=0), batches=[IMAGES])
    with pytest.raises(ValueError, match="`weight_ih_l0` belongs to none: exclude it"):
        prune(nn.LSTM(2, 2), 0.5, criterion=BatchNormScale(), include=["weight_ih*"], batches=[IMAGES])


def test_a_model_without_such_a_norm_is_refused_before_any_pass():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    for layer, is_there in (("0", True), ("2", False)):
        recipe = Recipe(0.5, criterion=BatchNormScale(), include=[layer])
        with nullcontext() if is_there else pytest.raises(ValueError, match="`2.weight` has no `norm_scale`"):
            Pruner(model, recipe)


def scores_of(criterion, reduction="mean"):
    """Return the scores of the channels of the stream, and of those inside the block."""
    model = Residual()
    granularity = Channel(reduction=reduction, normalize="none", multiple_of=1)
    recipe = Recipe(0.5, criterion=criterion, granularity=granularity)
    pruner = GroupPruner(model, recipe, Call(model, (IMAGES,), {}))
    assert list(pruner.scored) == [
        "stem.weight",
        "first.weight",
        "second.weight",
    ]  # nothing prunes the head's outputs
    if set(required_statistics(criterion)) != {"weight"}:
        calibrate(pruner.statistics, model, [IMAGES])
    pruner.choose_(1.0)
    assert sum(int(m.sum()) for m in pruner.choice.values()) == 8
    return model, pruner._scores["norms.second.weight"], pruner._scores["norms.first.weight"]


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_coupled_channels_are_scored_by_all_norms_that_write_them_and_nothing_else(reduction):
    """Neither what reads them has a say, nor counts a layer with more inputs for more."""
    model, stream, inside = scores_of(BatchNormScale(), reduction)
    stem, first, second = (model.norms[n].weight.detach().abs().double() for n in ("stem", "first", "second"))
    expected = {"mean": (stem + second) / 2, "sum": stem + second, "max": torch.maximum(stem, second)}
    torch.testing.assert_close(stream, expected[reduction])
    torch.testing.assert_close(inside, first)


@pytest.mark.parametrize("criterion", [MeanActivation(), APoZ(), GeometricMedian()], ids=str)
def test_other_criteria_of_outputs_are_not_thinned_out_by_what_reads_them(criterion):
    _, _, inside = scores_of(criterion)
    model = Residual().eval()
    filters, y = model.first.weight.flatten(1), model.first(F.relu(model.norms["stem"](model.stem(IMAGES))))
    expected = {
        MeanActivation(): lambda: y.abs().mean((0, 2, 3)),
        APoZ(): lambda: (y > 0).float().mean((0, 2, 3)),
        GeometricMedian(): lambda: torch.cdist(filters, filters).sum(1),
    }[criterion]()
    torch.testing.assert_close(inside, expected.detach().double(), rtol=1e-4, atol=1e-5)


def test_slimming_makes_the_model_smaller():
    model = Residual()
    shrink(
        model,
        IMAGES,
        0.5,
        criterion=BatchNormScale(),
        granularity=Channel(normalize="none", multiple_of=1),
        batches=[IMAGES],
    )
    assert model.stem.out_channels + model.first.out_channels == 8
    assert model(IMAGES).shape == (2, 5) and model.head.out_features == 5


def test_scores_of_both_signs_keep_their_order_when_they_are_normalised():
    """GraSP's are negative in most places: divided by a mean near zero, they would blow up or turn over."""
    found = _normalised(torch.tensor([-3.0, 1.0, 2.0 + 1e-6]), "mean", 3)
    torch.testing.assert_close(found, torch.tensor([-1.5, 0.5, 1.0]))
    torch.testing.assert_close(_normalised(torch.tensor([-4.0, 1.0]), "max", 2), torch.tensor([-1.0, 0.25]))
