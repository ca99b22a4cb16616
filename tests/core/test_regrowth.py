"""Dropping and growing against the published algorithm, written out weight by weight."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import ERK, Constant, Fixed, Local, PerRow, Random, Saliency, SynFlow, Wanda
from lightning_prune.core.regrowth import SparseRecipe, regrow


def by_hand(mask, drop, grow, fraction):
    """RigL's algorithm 1: sort, drop the k smallest of the layer, grow in each row the best of what is not active."""
    places = [(r, c) for r in range(len(mask)) for c in range(len(mask[0]))]
    active = [place for place in places if mask[place]]
    k = round(fraction * len(active))
    kept = set(sorted(active, key=lambda place: (-drop[place], place))[: len(active) - k])
    new = np.array([[(r, c) in kept for c in range(len(mask[0]))] for r in range(len(mask))])
    for r, row in enumerate(mask):
        free = sorted((c for c in range(len(row)) if not new[r, c]), key=lambda c: (-grow[r, c], c))
        new[r, free[: int(row.sum() - new[r].sum())]] = True
    return new


@given(st.data())
def test_it_is_the_published_algorithm_and_the_density_is_exact(data):
    num_rows, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    values = st.lists(st.integers(-3, 3), min_size=size, max_size=size)  # many ties
    draw = [data.draw(st.lists(values, min_size=num_rows, max_size=num_rows)) for _ in range(3)]
    mask, drop, grow = (torch.tensor(rows, dtype=torch.float64) for rows in draw)
    fraction = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    found = regrow(mask > 0, drop, grow, fraction)
    assert found.tolist() == by_hand(mask.numpy() > 0, drop.numpy(), grow.numpy(), fraction).tolist()
    assert torch.equal(found.sum(1), (mask > 0).sum(1))


def test_a_layer_with_hardly_a_free_place_keeps_its_density():
    """It would drop 5 of 19 and has one free place: a quick loop loses four weights at each update."""
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, 7] = False
    scores = torch.arange(20.0)[None]
    for _ in range(10):
        mask = regrow(mask, scores, torch.rand(1, 20, generator=torch.Generator().manual_seed(0)), 0.25)
        assert mask.sum() == 19


def test_what_is_not_active_is_not_dropped_whatever_its_score():
    mask = torch.tensor([[True, False, True]])
    found = regrow(mask, torch.tensor([[2.0, -9.0, 1.0]]), torch.tensor([[0.0, 5.0, 0.0]]), 0.5)
    assert found.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"drop_fraction": 1.5}, r"`drop_fraction` is a number in \[0, 1\], but got 1.5"),
        ({"sparsity": 1.0}, "`sparsity`"),
        ({"sparsity": None}, "`sparsity`"),
        ({"initial": Saliency()}, r"`initial` reads \['name', 'weight'\] .* reads \['grad'\]"),
        ({"initial": Wanda()}, "`initial` reads"),
        ({"grow": SynFlow()}, "`criterion` reads what training shows"),
        ({"sparsity": {"*": 0.5}, "scope": Local()}, "`sparsity` by pattern sets the scope"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, match):
    with pytest.raises(ValueError, match=match):
        SparseRecipe(**{"sparsity": 0.5, **settings})


def test_numbers_by_pattern_take_the_place_of_the_scope():
    assert SparseRecipe({"a": 0.5, "*": 0.9}).plain.scope == Fixed({"a": 0.5, "*": 0.9})
    assert SparseRecipe(0.5).plain.scope == ERK()
    assert SparseRecipe(0.5, scope=PerRow()).plain.scope == PerRow()


def test_the_dropped_fraction_falls_along_the_schedule_to_none():
    recipe = SparseRecipe(0.5, drop_fraction=0.4)
    assert [round(recipe.dropped(p), 6) for p in (0.0, 0.5, 1.0)] == [
        0.4,
        0.2,
        0.0,
    ]  # alpha / 2 (1 + cos(pi p))
    assert SparseRecipe(0.5, decay=None).dropped(1.0) == 0.3
    assert SparseRecipe(0.5, decay=Constant()).dropped(0.0) == 0.0


def test_it_describes_itself():
    assert SparseRecipe(0.5, grow=Random(seed=2)).describe()["grow"] == "Random(seed=2)"
