"""Sensitivity against pruning each layer by hand, and the allocation against all there are."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from lightning_prune import Magnitude, Slice, Wanda, allocate, prune, sensitivity

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def loss(model):
    with torch.no_grad():
        return float(nn.functional.mse_loss(model.eval()(X), Y))


@pytest.mark.parametrize(
    "options", [{}, {"criterion": Wanda(), "batches": [X]}, {"granularity": Slice(dim=0)}], ids=str
)
def test_each_point_is_one_layer_pruned_by_itself(options):
    model = net()
    before = copy.deepcopy(model.state_dict())
    curves = sensitivity(model, loss, [0.5, 0.8], **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, curve in curves.items():
        assert curve[0.0] == loss(net())
        for sparsity in (0.5, 0.8):
            alone = net()
            prune(alone, sparsity, include=[name], **options)
            assert curve[sparsity] == pytest.approx(loss(alone), rel=1e-6)


def test_an_interrupted_analysis_goes_on_and_the_model_is_whole():
    model, calls, done = net(), [], {}
    before = copy.deepcopy(model.state_dict())

    def stopping(m):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(m)

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, stopping, [0.5, 0.8], done=done)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(len(curve) for curve in done.values()) == 3 + 2  # dense for three layers, and two points
    later = []
    curves = sensitivity(model, lambda m: later.append(1) or loss(m), [0.5, 0.8], done=done)
    assert len(later) == 4 and curves == sensitivity(net(), loss, [0.5, 0.8])


def test_the_allocation_loses_least_of_all_there_are():
    """Convex curves on a grid whose points make up the overall sparsity exactly: every combination is tried."""
    grid, sizes = (0.0, 0.25, 0.5, 0.75), {"a": 40, "b": 40, "c": 80}
    bends = {"a": 1.0, "b": 3.0, "c": 0.5}
    curves = {name: {s: bend * s**2 * sizes[name] for s in grid} for name, bend in bends.items()}
    found = allocate(curves, sizes, 0.5)
    total = sum(sizes.values())
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(0.5 * total)

    def cost(chosen):
        return sum(curves[name][s] for name, s in chosen.items())

    fitting = [
        dict(zip(sizes, chosen, strict=True))
        for chosen in product(grid, repeat=3)
        if sum(s * sizes[n] for n, s in zip(sizes, chosen, strict=True)) == 0.5 * total
    ]
    best = min(fitting, key=cost)

    def between(name, s):
        low = max(g for g in grid if g <= s + 1e-9)
        high = min(g for g in grid if g >= s - 1e-9)
        share = (s - low) / (high - low) if high > low else 0.0
        return curves[name][low] * (1 - share) + curves[name][high] * share

    assert sum(between(n, s) for n, s in found.items()) <= cost(best) + 1e-9


def test_a_dent_in_a_curve_is_bridged():
    curves = {"a": {0.0: 0.0, 0.3: 1.0, 0.6: 0.3}, "b": {0.0: 0.0, 0.3: 0.4, 0.6: 0.8}}
    assert allocate(curves, {"a": 10, "b": 10}, 0.3) == pytest.approx({"a": 0.6, "b": 0.0})


def test_no_layer_passes_the_largest():
    curves = {"a": {0.0: 0.0, 0.5: 0.0, 0.9: 0.0}, "b": {0.0: 0.0, 0.5: 1.0, 0.9: 2.0}}
    sizes = {"a": 10, "b": 10}
    assert allocate(curves, sizes, 0.5) == pytest.approx({"a": 0.9, "b": 0.1})
    assert allocate(curves, sizes, 0.5, largest=0.8) == pytest.approx({"a": 0.5, "b": 0.5})
    with pytest.raises(
        ValueError, match=r"`sparsity` is at most what the curves reach together, 0\.9000, but got 0\.95"
    ):
        allocate(curves, sizes, 0.95)


@pytest.mark.filterwarnings("ignore:`curves` say that layers become better")  # of noise
def test_what_it_returns_is_what_prune_takes():
    model = net()
    curves = sensitivity(model, loss, [0.25, 0.5, 0.75])
    sizes = {name: model.get_parameter(name).numel() for name in curves}
    chosen = allocate(curves, sizes, 0.5)
    masks = prune(model, chosen, criterion=Magnitude())
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert removed == pytest.approx(0.5 * sum(sizes.values()), abs=len(sizes))


def test_bad_sparsities_are_refused():
    with pytest.raises(ValueError, match=r"`sparsities` is .* but got 1.0"):
        sensitivity(net(), loss, [1.0])


@pytest.mark.parametrize(
    ("evaluate", "sparsities", "message"),
    [
        (loss, 0.5, r"`sparsities` are several, such as \[0.5, 0.9\], but got 0.5"),
        (torch.zeros(2), [0.5], r"`evaluate` is a function of the model, but got tensor"),
        (nn.Linear(2, 2), [0.5], r"`evaluate` is a function of the model, but got Linear"),
    ],
)
def test_what_is_no_function_or_no_list_is_refused(evaluate, sparsities, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(net(), evaluate, sparsities)


def test_sparsities_may_come_from_a_generator():
    found = sensitivity(net(), loss, (value for value in (0.25, 0.5)))
    assert all(list(curve) == [0.0, 0.25, 0.5] for curve in found.values())
