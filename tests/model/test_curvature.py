"""Hessians: products against the whole matrix, formed by finite differences of gradients in float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import OBD, GraSP, SecondOrderTaylor, prune
from lightning_prune.core.criteria import required_statistics
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.curvature import hessian_product
from lightning_prune.model.statistics import Statistics
from lightning_prune.model.targets import select_targets


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches(num=2):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 3, generator=draw).double(), torch.randint(0, 2, (5,), generator=draw))
        for _ in range(num)
    ]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def flat_gradient(model, targets, data):
    model.zero_grad()
    (sum(loss(model, batch) for batch in data) / len(data)).backward()
    return np.concatenate([p.grad.flatten().numpy() for p in targets.values()])


def hessian(model, targets, data, step=1e-5):
    """Each column: how the gradient of the mean loss changes with one weight."""
    columns = []
    for p in targets.values():
        values = p.data.view(-1)
        for i in range(len(values)):
            before, ends = float(values[i]), []
            for sign in (1, -1):
                values[i] = before + sign * step
                ends.append(flat_gradient(model, targets, data))
            values[i] = before
            columns.append((ends[0] - ends[1]) / (2 * step))
    return np.stack(columns, axis=1)


def flat(tensors):
    return np.concatenate([t.detach().flatten().numpy() for t in tensors])


def statistics_of(model, names, data):
    targets = select_targets(model)
    statistics = Statistics(model, targets, names)
    calibrate(statistics, model, data, loss=loss)
    return statistics.read(), targets


def test_a_product_is_the_hessian_times_the_vector():
    model, data = network(), batches(1)
    targets = select_targets(model)
    vectors = {name: torch.randn_like(p) for name, p in targets.items()}
    found = hessian_product(lambda: loss(model, data[0]), targets, vectors)
    expected = hessian(model, targets, data) @ flat(vectors.values())
    np.testing.assert_allclose(flat(found.values()), expected, atol=1e-8)


def test_the_hessian_times_the_gradient_is_over_all_batches():
    """Not the mean of H g of each batch: both are means first, as in the paper's code."""
    model, data = network(), batches(3)
    stats, targets = statistics_of(model, ["hessian_gradient"], data)
    expected = hessian(model, targets, data) @ flat_gradient(model, targets, data)
    np.testing.assert_allclose(flat(s["hessian_gradient"] for s in stats.values()), expected, atol=1e-8)


def test_hutchinson_comes_near_the_diagonal_and_is_the_same_each_time():
    model, data = network(), batches(1)
    stats, targets = statistics_of(model, ["hessian_diagonal"], data * 2000)
    found, expected = (
        flat(s["hessian_diagonal"] for s in stats.values()),
        np.diag(hessian(model, targets, data)),
    )
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    again, _ = statistics_of(model, ["hessian_diagonal"], data * 2000)
    assert all(torch.equal(s["hessian_diagonal"], again[n]["hessian_diagonal"]) for n, s in stats.items())


def test_hutchinson_is_exact_where_the_hessian_is_diagonal():
    layer = nn.Linear(3, 1, bias=False)
    curvature = torch.tensor([[2.0, -1.0, 0.5]])
    targets = select_targets(layer)
    statistics = Statistics(layer, targets, ["hessian_diagonal"])
    calibrate(statistics, layer, [0], loss=lambda m, _: (curvature * m.weight**2).sum() / 2)
    torch.testing.assert_close(statistics.read()["weight"]["hessian_diagonal"], curvature)


def test_a_linear_loss_has_no_curvature():
    layer = nn.Linear(3, 1)
    found = hessian_product(layer.weight.sum, {"weight": layer.weight}, {"weight": torch.ones(1, 3)})
    assert found["weight"].count_nonzero() == 0


@pytest.mark.parametrize("criterion", [OBD(), SecondOrderTaylor(), GraSP()], ids=str)
def test_criteria_agree_with_the_formula_on_the_whole_hessian(criterion):
    model, data = network(), batches(2)
    stats, targets = statistics_of(model, required_statistics(criterion), data)
    scores = flat(criterion(**s) for s in stats.values())
    w, g, h = flat(targets.values()), flat_gradient(model, targets, data), hessian(model, targets, data)
    if criterion == GraSP():
        np.testing.assert_allclose(scores, w * (h @ g), atol=1e-8)
        return
    diagonal = flat(s["hessian_diagonal"] for s in stats.values())
    expected = w**2 * diagonal / 2 if criterion == OBD() else (w * g - w**2 * diagonal / 2) ** 2
    np.testing.assert_allclose(scores, expected, atol=1e-10)


def test_pruning_leaves_gradients_and_modes_as_they_were():
    model = network().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    masks = prune(model, 0.5, criterion=GraSP(), batches=iter(batches()), loss=loss)
    assert sum(int(m.sum()) for m in masks.values()) == 10
    assert model.training and bool((model[0].weight.grad == 1).all()) and model[2].weight.grad is None


def test_attention_can_be_differentiated_twice():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    masks = prune(
        attention, 0.5, criterion=GraSP(), batches=[x], loss=lambda m, b: m(b, b, b)[0].square().mean()
    )
    assert sum(int(m.sum()) for m in masks.values()) == 32


def test_what_has_no_second_derivative_is_refused():
    layer = nn.Linear(2, 2)
    loss = lambda model, batch: torch.cdist(model(batch), batch).sum()  # noqa: E731
    with pytest.raises(ValueError, match="second derivatives, which an operation of the model does not have"):
        prune(layer, 0.5, criterion=GraSP(), batches=[torch.ones(1, 2)], loss=loss)
