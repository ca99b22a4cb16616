"""Numbers that are none: NaN is an error that names the weight, infinity comes first, and no layer dies of either."""

import math

import pytest
import torch

from lightning_prune import (
    LAMP,
    OWL,
    Block,
    Channel,
    Global,
    GradientMagnitude,
    InitialPruning,
    Isomorphic,
    LeastSquares,
    Local,
    Movement,
    NofM,
    PerRow,
    Saliency,
    Slice,
    SparseGPT,
    SparseTraining,
    TrainTimePruning,
    Wanda,
    WeightRewinding,
    Window,
    prune,
    shrink,
)
from lightning_prune.core.regrowth import regrow
from tests.callbacks.toy import Toy, data, trainer

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
NAN, INF = math.nan, math.inf
SCOPES = [Global(), Local(), Isomorphic(), PerRow(), LAMP(), OWL(), NofM()]
CANNOT = "`body.0.weight` has scores that can be ranked, but got .* NaN"


def with_weight(value):
    module = Toy()
    with torch.no_grad():
        module.body[0].weight[0, 0] = value
    return module


def sparsity_of(scope):
    return None if isinstance(scope, NofM) else 0.5


@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: type(s).__name__)
def test_a_weight_that_is_nan_is_named_by_every_scope(scope):
    module = with_weight(NAN)
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=r"`body\.0\.weight`"):
        prune(module, sparsity_of(scope), scope=scope)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0))


@pytest.mark.parametrize(
    "scope", [Global(), Local(), Isomorphic(), PerRow(), NofM()], ids=lambda s: type(s).__name__
)
def test_an_infinite_weight_comes_first_and_costs_no_other_layer_anything(scope):
    masks = prune(with_weight(INF), sparsity_of(scope), scope=scope)
    finite = prune(with_weight(1e30), sparsity_of(scope), scope=scope)
    assert bool(masks["body.0.weight"][0, 0])
    assert all(torch.equal(masks[name], finite[name]) for name in masks)


@pytest.mark.parametrize("scope", [LAMP(), OWL()])
def test_scopes_that_sum_scores_up_refuse_infinity(scope):
    with pytest.raises(ValueError, match=r"finite, but got inf.* `body\.0\.weight`"):
        prune(with_weight(INF), 0.5, scope=scope)


@pytest.mark.parametrize("granularity", [Slice(dim=0), Block(2, 2)])
@pytest.mark.parametrize("value", [NAN, INF])
def test_groups_are_as_good_as_the_numbers_in_them(granularity, value):
    if value is NAN:
        with pytest.raises(ValueError, match=CANNOT):
            prune(with_weight(value), 0.5, granularity=granularity)
    else:
        assert bool(prune(with_weight(value), 0.5, granularity=granularity)["body.0.weight"][0, 0])


@pytest.mark.parametrize("value", [NAN, INF])
def test_structured_pruning_leaves_the_model_as_it_was(value):
    module = with_weight(value)
    shapes = [p.shape for p in module.parameters()]
    with pytest.raises(ValueError, match=CANNOT):
        shrink(module, X, 0.5, granularity=Channel())
    assert [p.shape for p in module.parameters()] == shapes


def test_inputs_that_are_nan():
    bad = X.clone()
    bad[0, 0] = NAN
    with pytest.raises(ValueError, match=CANNOT):
        prune(Toy().eval(), 0.5, criterion=Wanda(), batches=[bad])
    for solver in (SparseGPT(), LeastSquares()):
        with pytest.raises(ValueError, match=r"`body\.0\.weight` has inputs that are infinite or NaN"):
            prune(Toy().eval(), 0.5, solver=solver, batches=[bad])


class Diverging(Toy):
    """The loss of the fourth batch is no number."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * NAN if batch_idx == 3 else loss


EVERY_STEP = Window(every=0.01)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: TrainTimePruning(0.5, report=False),
        lambda: TrainTimePruning(0.5, criterion=Saliency(), report=False),
        lambda: TrainTimePruning(0.5, criterion=Movement(), report=False),
        lambda: SparseTraining(0.5, window=EVERY_STEP, report=False),
        lambda: SparseTraining(0.5, window=EVERY_STEP, scope=PerRow(), report=False),
        lambda: WeightRewinding(0.5, num_levels=1, report=False),
    ],
    ids=["magnitude", "saliency", "movement", "rigl", "srigl", "rewinding"],
)
def test_a_run_that_diverges_stops_where_it_is_pruned_next_and_names_the_weight(callback):
    with pytest.raises(ValueError, match="`body.0.weight` has scores that can be ranked, but got"):
        trainer(callback(), max_epochs=2).fit(Diverging(), data(), data())


def test_gradients_that_overflow_are_told_from_nan():
    """An infinite gradient ranks first; NaN, as of infinity times zero, has no place."""
    mask, scores = torch.tensor([[True, False, False]]), torch.tensor([[1.0, 0.0, 0.0]])
    grown = regrow(mask, scores, GradientMagnitude()(grad=torch.tensor([[0.0, 1.0, -INF]])), 1.0)
    assert grown.tolist() == [[False, False, True]]
    two_rows = torch.tensor([[True, False], [True, False]])
    for rows in (mask, two_rows):
        bad = torch.zeros(rows.shape)
        bad[0, 1] = NAN
        with pytest.raises(ValueError, match="`layer` has scores that can be ranked, but got 1 NaN"):
            regrow(rows, torch.ones(rows.shape), bad, 1.0, "layer")


def test_pruning_before_training_refuses_a_loss_that_is_none():
    class Lost(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * NAN

    with pytest.raises(ValueError, match=CANNOT):
        trainer(InitialPruning(0.5, report=False)).fit(Lost(), data(), data())


def test_no_layer_is_left_without_a_weight():
    """All gradients of a layer are zero: its scores are the lowest of all, and yet it lives."""
    module = Toy()
    with torch.no_grad():
        module.body[4].weight.mul_(1e-30)
    masks = prune(module, 0.9)
    assert all(bool(mask.any()) for mask in masks.values())
