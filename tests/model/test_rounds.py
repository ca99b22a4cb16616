"""Rounds against the published algorithms, written out in numpy on small networks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import Channel, Local, Magnitude, Saliency, SynFlow, prune
from lightning_prune.core.recipe import Recipe, checked_rounds
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.calls import Call
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.rounds import prune_in_rounds_, round_fractions
from tests.model.test_flow import network, synflow

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(3)), torch.arange(16) % 3


def loss(model, batch):
    return F.cross_entropy(model(batch), Y)


def pruned(model, criterion, num_rounds, sparsity=0.9, **options):
    pruner = Pruner(model, Recipe(sparsity, criterion=criterion))
    prune_in_rounds_(
        pruner, num_rounds, lambda: calibrate(pruner.statistics, model, [X], loss=loss), **options
    )
    return pruner


def weights_of(model):
    return [m.weight.detach().double().numpy() for m in model if isinstance(m, nn.Linear)]


def top(scores, num_keep):
    flat = np.concatenate([s.flatten() for s in scores])
    kept = np.zeros(len(flat), dtype=bool)
    kept[np.argsort(-flat, kind="stable")[:num_keep]] = True
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(kept, ends), scores, strict=True)]


@pytest.mark.parametrize("num_rounds", [1, 7, 100])
def test_density_falls_by_the_same_factor_in_each_round(num_rounds):
    density = 1 - 0.98 * np.array(round_fractions(0.98, num_rounds))
    np.testing.assert_allclose(density, 0.02 ** (np.arange(1, num_rounds + 1) / num_rounds))
    assert (
        round_fractions(0.98, num_rounds)[-1] == 1.0
        and round_fractions(0.0, num_rounds) == [1.0] * num_rounds
    )


def test_synflow_in_rounds_is_the_published_algorithm():
    model = network(6, 12, 9, 3)
    weights = weights_of(model)
    masks, total = [np.ones_like(w, dtype=bool) for w in weights], sum(w.size for w in weights)
    for k in range(1, 11):
        scores = synflow([w * m for w, m in zip(weights, masks, strict=True)])
        num_removed = round(total * (1 - 0.1 ** (k / 10)))
        masks = top([np.where(m, s, -1.0) for s, m in zip(scores, masks, strict=True)], total - num_removed)
    found = pruned(model, SynFlow(), 10).masks
    for ours, theirs in zip(found.values(), masks, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_synflow_in_rounds_leaves_paths_where_a_single_round_leaves_none():
    """Layers of very different widths, and hardly more weights than one path has: Tanaka et al. 2020, section 6."""
    sparsity = 1 - 8 / (200 * 40 + 40 * 4 + 4 * 200 + 200 * 3)

    def num_paths(num_rounds):
        model = network(200, 40, 4, 200, 3)
        pruner = Pruner(model, Recipe(sparsity, criterion=SynFlow()))
        measure = lambda: calibrate(pruner.statistics, model, [torch.zeros(1, 200)])  # noqa: E731
        prune_in_rounds_(pruner, num_rounds, measure)
        first, *others = (mask.double() for mask in pruner.masks.values())
        reached = first.sum(1)
        for mask in others:
            reached = mask @ reached
        return float(reached.sum())

    assert num_paths(100) > 0 == num_paths(1)


def snip_in_rounds(model, num_rounds, revive):
    """De Jorge et al. 2020, algorithm 1: the gradient of the masked network times the weights as they were."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    dense = [layer.weight.detach().clone() for layer in layers]
    masks = [torch.ones_like(w) for w in dense]
    for k in range(1, num_rounds + 1):
        masked = [(w * m).requires_grad_() for w, m in zip(dense, masks, strict=True)]
        x = X
        for i, (w, layer) in enumerate(zip(masked, layers, strict=True)):
            x = F.linear(x, w, layer.bias)
            x = F.relu(x) if i < len(layers) - 1 else x
        F.cross_entropy(x, Y).backward()
        scores = [(w * v.grad).abs() for w, v in zip(dense, masked, strict=True)]
        if not revive:
            scores = [torch.where(m > 0, s, -1.0) for s, m in zip(scores, masks, strict=True)]
        total = sum(w.numel() for w in dense)
        kept = top([s.numpy() for s in scores], total - round(total * (1 - 0.1 ** (k / num_rounds))))
        masks = [torch.from_numpy(m).float() for m in kept]
    return dense, masks


@pytest.mark.parametrize("revive", [False, True], ids=["iterative-snip", "force"])
def test_snip_in_rounds_is_the_published_algorithm(revive):
    model = network(6, 12, 9, 3, bias=True)
    dense, masks = snip_in_rounds(network(6, 12, 9, 3, bias=True), 5, revive)
    found = pruned(model, Saliency(), 5, revive=revive).masks
    for i, (ours, theirs, weight) in enumerate(zip(found.values(), masks, dense, strict=True)):
        assert torch.equal(ours.float(), theirs)
        assert torch.equal(model[2 * i].weight, weight * theirs)


def test_force_brings_weights_back():
    kept = []
    model = network(6, 12, 9, 3)
    pruner = Pruner(model, Recipe(0.9, criterion=Saliency()))

    def measure():
        kept.append({n: m.clone() for n, m in pruner.masks.items()})
        calibrate(pruner.statistics, model, [X], loss=loss)

    prune_in_rounds_(pruner, 8, measure, revive=True)
    back = [bool((now[n] & ~before[n]).any()) for before, now in pairwise(kept[1:]) for n in now]
    assert any(back)


def test_rounds_of_a_criterion_that_does_not_change_end_as_one():
    first, second = network(6, 12, 3), network(6, 12, 3)
    for model, num_rounds in ((first, 1), (second, 9)):
        pruner = Pruner(model, Recipe(0.7, criterion=Magnitude(), scope=Local()))
        prune_in_rounds_(pruner, num_rounds, lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("revive", [False, True])
def test_coupled_channels_go_in_rounds(revive):
    model = network(6, 12, 9, 3, bias=True)
    before = [p.detach().clone() for p in model.parameters()]
    recipe = Recipe(0.5, criterion=Saliency(), granularity=Channel(multiple_of=1))
    pruner = GroupPruner(model, recipe, Call(model, (X,), {}))
    prune_in_rounds_(pruner, 4, lambda: calibrate(pruner.statistics, model, [X], loss=loss), revive=revive)
    assert sum(int(m.sum()) for m in pruner.choice.values()) == pytest.approx(10, abs=1)
    for (name, p), dense in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, dense * pruner.masks[name] if name in pruner.masks else dense)


def test_prune_takes_rounds():
    first, second = network(6, 12, 9, 3), network(6, 12, 9, 3)
    masks = prune(first, 0.9, criterion=SynFlow(), batches=iter([X]), num_rounds=10)
    assert all(torch.equal(m, masks[n]) for n, m in pruned(second, SynFlow(), 10).masks.items())
    with pytest.raises(ValueError, match="`num_rounds` is a whole number of at least 1, but got 0"):
        prune(network(6, 3), 0.5, num_rounds=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, False, None), "`num_rounds` is a whole number of at least 1, but got 0"),
        ((1, True, None), "`revive` lets weights come back in later rounds, but got num_rounds=1"),
        ((2, False, "a budget"), "`num_rounds` is 1 with a budget, but got 2 with a budget"),
    ],
)
def test_bad_rounds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        checked_rounds(*arguments)
