"""Blocks ranked by a criterion: against means, sums and maxima of its scores in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prune
from lightning_prune import Budget, Layer, Magnitude, Wanda, shrink
from lightning_prune.core.criteria.activations import MeanActivation
from lightning_prune.core.recipe import Recipe
from lightning_prune.model.block_scores import score_blocks
from lightning_prune.model.calls import call_of
from lightning_prune.model.depth_pruning import DepthPruner
from tests.members import members

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
REDUCED = {"mean": np.mean, "sum": np.sum, "max": np.max}


class Block(nn.Module):
    """Two layers, which batch norms read."""

    def __init__(self, width=4, scale=1.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4), nn.BatchNorm1d(4)
        )
        with torch.no_grad():
            for layer in (self.body[0], self.body[3]):
                layer.weight.mul_(scale)

    def forward(self, x):
        return x + self.body(x)


def model_of(*blocks):
    return nn.Sequential(nn.Linear(4, 4), *blocks, nn.Linear(4, 3)).eval()


def three():
    torch.manual_seed(0)
    return model_of(Block(4, scale=2.0), Block(32), Block(6, scale=0.5))


def weights_of(block):
    return [block.body[place].weight.detach().double().numpy() for place in (0, 3)]


def ranked(model, criterion, reduction):
    """The scores of the blocks as the pruner has them, with calibration on the example."""
    recipe = Recipe(0.5, criterion, Layer(reduction=reduction))
    pruner = DepthPruner(model, recipe, call_of(model, X))
    with pruner.statistics.watch(), torch.no_grad():
        model(X)
    pruner.choose_(1.0)
    return pruner.scores


@pytest.mark.parametrize("reduction", REDUCED)
def test_scores_are_those_of_all_weights_in_a_block(reduction):
    model = three()
    found = ranked(model, Magnitude(p=2), reduction)
    for path, score in found.items():
        squares = np.concatenate([w.ravel() ** 2 for w in weights_of(model[int(path)])])
        assert score == pytest.approx(REDUCED[reduction](squares), rel=1e-6)
    assert list(found) == ["1", "2", "3"]


def test_the_mean_favours_no_large_block_and_the_sum_does():
    for reduction, gone in (("mean", "3"), ("sum", "3"), ("max", "3")):
        plan = shrink(three(), X, 0.3, criterion=Magnitude(p=2), granularity=Layer(reduction=reduction))
        assert plan.replaced == {gone: "skip"}
    for reduction, gone in (("mean", "2"), ("sum", "1")):
        torch.manual_seed(0)
        model = model_of(Block(4, scale=1.0), Block(64, scale=0.7))
        plan = shrink(model, X, 0.5, criterion=Magnitude(p=2), granularity=Layer(reduction=reduction))
        assert plan.replaced == {gone: "skip"}


@pytest.mark.parametrize("reduction", REDUCED)
def test_activations_count(reduction):
    """Wanda: |weight| times the norm of its input, but for a factor that all blocks have in common."""
    model, inputs = three(), {}
    watch(model, lambda key, x, _: inputs.update({key: x}))
    found, expected = ranked(model, Wanda(), reduction), {}
    for path in found:
        norms = [np.sqrt((inputs[path, place] ** 2).mean(0)) for place in (0, 3)]
        scores = [np.abs(w) * norm for w, norm in zip(weights_of(model[int(path)]), norms, strict=True)]
        expected[path] = REDUCED[reduction](np.concatenate([s.ravel() for s in scores]))
    factor = found["1"] / expected["1"]
    assert found == pytest.approx({path: factor * score for path, score in expected.items()}, rel=1e-4)


def watch(model, see):
    for path in ("1", "2", "3"):
        for place in (0, 3):
            model[int(path)].body[place].register_forward_hook(
                lambda _, args, out, key=(path, place): see(
                    key, args[0].double().numpy(), out.double().numpy()
                )
            )


def test_a_score_of_an_output_counts_once():
    model, outputs = three(), {}
    watch(model, lambda key, _, y: outputs.update({key: y}))
    found = ranked(model, MeanActivation(), "sum")
    for path, score in found.items():
        means = [np.abs(outputs[path, place]).mean(0) for place in (0, 3)]
        assert score == pytest.approx(sum(m.sum() for m in means), rel=1e-4)


@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("criterion", members("criterion"), ids=str)
def test_every_criterion_ranks_blocks(criterion, reduction):
    if "movement" in lightning_prune.core.criteria.required_statistics(criterion):
        pytest.skip("a sum over training")
    if criterion == Magnitude():
        pytest.skip("stands for the influence")
    model, y = three(), torch.arange(6) % 3

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch), y)

    plan = shrink(
        model, X, 0.7, criterion=criterion, granularity=Layer(reduction=reduction), batches=[X], loss=loss
    )
    assert len(plan.replaced) == 2 and plan.error is not None and plan.error < 1e-10


def test_a_criterion_goes_with_a_budget():
    model = three()
    before = sum(p.numel() for p in model.parameters())
    small = sum(p.numel() for p in model[3].parameters())
    budget = Budget(params=(before - small) / before, tolerance=1e-9)
    assert shrink(model, X, criterion=Magnitude(p=2), budget=budget, granularity=Layer()).replaced == {
        "3": "skip"
    }


def test_blocks_without_a_layer_are_refused_and_influence_ranks_them():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return x + x @ self.weight

    with pytest.raises(
        ValueError, match="`criterion` ranks blocks by the weights of .* but got 2 without: exclude it"
    ):
        shrink(model_of(Block(), Bare()), X, 0.5, criterion=Magnitude(p=2), granularity=Layer())
    assert shrink(model_of(Bare(), Bare()), X, 0.5, granularity=Layer()).replaced


def test_without_data_a_criterion_that_needs_it_is_refused():
    with pytest.raises(ValueError, match="`batches`"):
        shrink(three(), X, 0.5, criterion=Wanda(), granularity=Layer())


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="`criterion` gives weights finite scores, but got others in a"):
        score_blocks(["a", "b"], {"a.weight": torch.tensor([float("nan")]), "b.weight": torch.ones(2)})
