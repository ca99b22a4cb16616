"""OWL against the formula of its paper in numpy, for layers of equal size, as there."""

import math

import numpy as np
import pytest
import torch

from lightning_prune import OWL
from lightning_prune.core.scopes.outliers import keep_in_rows, layers_of


def scores_of(num_layers=4, size=400, seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(num_layers):
        for part in ("q", "mlp"):
            scores = torch.rand(20, size // 20, generator=draw)
            scores.view(-1)[: 7 * layer] *= 100.0  # more outliers with depth
            found[f"layers.{layer}.{part}.weight"] = scores
    return found


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("threshold", [3.0, 5.0])
def test_densities_are_those_of_the_paper(sparsity, threshold):
    """A layer's scores are compared with their mean as one vector, whatever the sizes and scales of its parts."""
    scores = scores_of()
    for layer in range(4):
        scores[f"layers.{layer}.up.weight"] = 3.0 * torch.rand(40, 20) ** (layer + 1)
    masks = OWL(threshold=threshold, width=0.08)(scores, sparsity)
    parts = [[s.numpy().ravel() for n, s in scores.items() if n.startswith(f"layers.{i}.")] for i in range(4)]
    layers = [np.concatenate(layer) for layer in parts]
    ratios = np.array([(layer > threshold * layer.mean()).mean() for layer in layers])
    shifted = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 0.08 * 2
    densities = shifted - shifted.mean() + (1 - sparsity)
    for layer, density in enumerate(densities):
        for part in ("q", "mlp", "up"):
            found = masks[f"layers.{layer}.{part}.weight"].float().mean()
            assert float(found) == pytest.approx(density, abs=1 / 400)
    assert densities.max() - densities.min() == pytest.approx(0.16)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.33, 0.98, 0.999])
def test_the_number_kept_is_exact_at_any_sparsity(sparsity):
    scores = scores_of() | {"head.weight": torch.rand(7, 3)}
    total = sum(s.numel() for s in scores.values())
    masks = OWL(width=0.3)(scores, sparsity)
    assert sum(int(mask.sum()) for mask in masks.values()) == total - round(total * sparsity)


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("dense", ["large", "small"])
def test_no_layer_dies_whatever_the_sizes(sparsity, dense):
    sizes = {"large": 300, "middle": 100, "small": 10}
    scores = {name: torch.rand(size, 780) for name, size in sizes.items()}
    scores[dense].view(-1)[:500] *= 1000.0  # all outliers are here
    masks = OWL(width=0.3)(scores, sparsity)
    densities = {name: float(mask.float().mean()) for name, mask in masks.items()}
    assert max(densities, key=densities.get) == dense
    for density in densities.values():
        assert (1 - sparsity) / 2 - 1e-3 <= density <= 1 - sparsity / 2 + 1e-3


def test_each_parameter_keeps_its_best():
    scores = scores_of()
    for name, mask in OWL()(scores, 0.6).items():
        assert scores[name][mask].min() >= scores[name][~mask].max()


@pytest.mark.parametrize("sparsity", [0.1, 0.55, 0.9, 0.999])
def test_rows_keep_equally_many_of_their_best(sparsity):
    scores = scores_of()
    masks, whole = (OWL(per_row=rows)(scores, sparsity) for rows in (True, False))
    for name, mask in masks.items():
        each = mask.sum(1)
        assert int(mask.sum()) == int(whole[name].sum()) and int(each.max() - each.min()) <= 1
        for row, marks in zip(scores[name], mask, strict=True):
            assert marks.all() or not marks.any() or row[marks].min() >= row[~marks].max()


def test_the_number_kept_is_exact_where_rows_have_too_few_that_were_not_pruned_before():
    """Of scores at minus infinity, too, each counts once."""
    scores = torch.full((3, 4), -math.inf)
    scores[0] = torch.arange(4.0)
    for num_keep in range(13):
        mask = keep_in_rows(scores, num_keep, "weight")
        assert int(mask.sum()) == num_keep and int(mask.sum(1).max() - mask.sum(1).min()) <= 1


def test_rows_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="compares within rows, of at least two dims"):
        OWL(per_row=True).check({"a": torch.ones(3)}, 0.5)


def test_without_outliers_it_is_uniform():
    scores = {f"h.{i}": torch.arange(100.0)[torch.randperm(100)] for i in range(3)}
    assert {int(mask.sum()) for mask in OWL()(scores, 0.5).values()} == {50}


BLOCK = ("attn.q.weight", "mlp.0.weight", "mlp.2.weight")


@pytest.mark.parametrize(
    ("prefixes", "others"),
    [
        (["h.0.", "h.1.", "h.2."], ["embed.weight", "head.weight"]),
        (["1.0.", "1.1."], ["0.weight", "2.0.weight"]),  # blocks in a Sequential in a Sequential
        (["net.layers.0.blocks.0.", "net.layers.0.blocks.1."], ["net.layers.0.down.weight"]),
        (["encoder.3.", "encoder.4.", "decoder.0.", "decoder.1."], []),
    ],
)
def test_a_layer_is_a_block_that_is_repeated(prefixes, others):
    blocks = [[prefix + end for end in BLOCK] for prefix in prefixes]
    assert layers_of([*others, *(name for block in blocks for name in block)]) == blocks


def test_without_blocks_each_parameter_is_a_layer():
    assert layers_of(["0.weight", "2.weight"]) == [["0.weight"], ["2.weight"]]
    assert layers_of(["conv1.weight", "fc.weight"]) == [["conv1.weight"], ["fc.weight"]]
    assert layers_of(["weight"]) == [["weight"]]


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_what_belongs_to_no_block_has_the_density_of_the_whole(sparsity):
    head = torch.rand(40, 50)
    head[:4] *= 1000.0  # outliers that would make all blocks alike
    with_head = OWL()(scores_of() | {"head.weight": head}, sparsity)
    without = OWL()(scores_of(), sparsity)
    assert float(with_head["head.weight"].float().mean()) == pytest.approx(1 - sparsity, abs=1e-3)
    for name, mask in without.items():
        assert float(with_head[name].float().mean()) == pytest.approx(float(mask.float().mean()), abs=5e-3)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"threshold": 0.0}, "`threshold` is a number above 0"),
        ({"width": 0.5}, r"`width` is a number in \(0, 0.5\), but got 0.5"),
        ({"width": 0.0}, r"`width` is a number in \(0, 0.5\), but got 0.0"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        OWL(**settings)
