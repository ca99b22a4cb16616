"""Laws of every scope, and each one against a sort or the paper's formula written out with numpy."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import (
    ERK,
    LAMP,
    OBD,
    OWL,
    Allocated,
    ConstantFanIn,
    Fixed,
    Global,
    Local,
    Movement,
    NofM,
    PerRow,
)
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.scopes.curves import allocate
from lightning_prune.core.scopes.rankings import running_sums
from lightning_prune.core.types import LazyScores, Prescribes
from tests.members import members

SHAPES = {"a.weight": (16, 32), "b.weight": (8, 16), "c.weight": (24, 8, 3, 3)}
SCOPES = members("scope")
CURVES = Allocated({"a": {0.0: 1.0, 0.3: 1.1, 0.6: 2.0}})


def random_scores(seed=0, shapes=SHAPES, **kind):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}


def lazy(scores):
    return LazyScores({name: tuple(s.shape) for name, s in scores.items()}, lambda name: scores[name].clone())


def end_of(scope, default=0.9):
    return scope.prescribed(SHAPES) if isinstance(scope, Prescribes) else default


def num_kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.77, 1.0])
def test_scope_keeps_the_number_asked_for(scope, fraction):
    """Exactly, over all or in each row or parameter by the rounding that the docs give; ties make no difference."""
    sparsity = fraction * end_of(scope)
    distinct, equal = (
        scope(random_scores(), sparsity),
        scope({n: torch.ones(s) for n, s in SHAPES.items()}, sparsity),
    )
    total = sum(math.prod(s) for s in SHAPES.values())
    slack = sum(s[0] for s in SHAPES.values()) if isinstance(scope, (PerRow, ConstantFanIn)) else len(SHAPES)
    exact = isinstance(scope, (Global, ERK, LAMP, OWL, Allocated))
    assert abs(num_kept(distinct) - (total - round(total * sparsity))) <= (0 if exact else slack)
    assert num_kept(equal) == num_kept(distinct)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_scope_gives_boolean_masks_and_is_pure(scope):
    scores = random_scores()
    before = {name: s.clone() for name, s in scores.items()}
    masks = scope(scores, 0.5 * end_of(scope))
    assert list(masks) == list(SHAPES)
    assert all(m.dtype == torch.bool and m.shape == SHAPES[n] for n, m in masks.items())
    assert all(torch.equal(scores[n], before[n]) for n in scores)
    again = scope(lazy(scores), 0.5 * end_of(scope))
    assert all(torch.equal(masks[n], again[n]) for n in masks), "lazy scores give other masks"


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@given(seed=st.integers(0, 50), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)), coarse=st.booleans())
@settings(max_examples=25)
def test_masks_are_nested_as_sparsity_grows(scope, seed, fractions, coarse):
    low, high = sorted(fractions)
    scores = random_scores(seed)
    if coarse:
        scores = {name: (s * 4).round() for name, s in scores.items()}  # many ties
    end = end_of(scope)
    large, small = scope(scores, low * end), scope(scores, high * end)
    if isinstance(scope, ERK):
        return  # shares move between layers as some become dense
    assert all(bool((small[n] <= large[n]).all()) for n in SHAPES)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_what_was_pruned_goes_first(scope):
    """Scores of minus infinity, as pruned weights have them, are given up before any other."""
    scores = random_scores()
    gone = scope(scores, 0.4 * end_of(scope))
    marked = {n: s.masked_fill(~gone[n], -math.inf) for n, s in random_scores(seed=1).items()}
    masks = scope(marked, end_of(scope))
    assert all(bool((masks[n] <= gone[n]).all()) for n in SHAPES)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_global_against_a_stable_sort(sparsity):
    scores = {n: (s * 50).round() for n, s in random_scores().items()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    expected = torch.zeros(flat.numel(), dtype=torch.bool)
    expected[flat.argsort(descending=True, stable=True)[: flat.numel() - round(flat.numel() * sparsity)]] = (
        True
    )
    masks = Global(min_keep=0)(scores, sparsity)
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), expected)


def test_global_guard_keeps_every_layer_alive_and_the_total_exact():
    scores = {
        "tiny": torch.full((10, 10), 1e-6),
        "low": torch.full((50,), 0.1),
        "big": torch.rand(100, 10) + 1,
    }
    masks = Global(min_keep=3)(scores, 0.9)
    assert [int(m.sum()) for m in masks.values()] == [3, 3, 109]
    assert torch.equal(masks["tiny"].flatten().nonzero().flatten(), torch.arange(3))
    assert [int(m.sum()) for m in Global(min_keep=0.05)(scores, 0.9).values()] == [5, 3, 107]


def test_global_guard_that_cannot_be_met_is_refused():
    with pytest.raises(
        ValueError, match=r"`min_keep` is at most what the sparsity leaves, 5 groups in all, but got 8"
    ):
        Global(min_keep=8)({"a": torch.zeros(50), "b": torch.rand(50) + 1}, 0.95)


@pytest.mark.parametrize("sparsity", [0.1, 0.45, 0.7, 0.85])
def test_allocated_gives_up_a_weight_at_a_time_where_it_costs_least(sparsity):
    """Against taking single weights off the layer whose convex curve rises least there."""
    grid = [0.0, 0.25, 0.5, 0.75, 1.0 - 1 / 64]
    bends = {"a": 1.0, "b": 5.0, "c": 0.3}
    sizes = {"a": 64, "b": 64, "c": 128}
    curves = {name: {s: bend * s**2 for s in grid} for name, bend in bends.items()}

    def price(name, removed):
        share = removed / sizes[name]
        low = max(s for s in grid if s <= share + 1e-12)
        high = next((s for s in grid if s > low), None)
        return math.inf if high is None else bends[name] * (high**2 - low**2) / ((high - low) * sizes[name])

    removed = dict.fromkeys(sizes, 0)
    for _ in range(round(sparsity * sum(sizes.values()))):
        removed[min(removed, key=lambda name: price(name, removed[name]))] += 1
    masks = Allocated(curves)({name: torch.rand(size) for name, size in sizes.items()}, sparsity)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == removed


def test_curves_of_accuracies_are_those_of_losses_upside_down(tmp_path):
    losses = {"a": {0.0: 0.1, 0.5: 0.2, 0.9: 0.6}, "b": {0.0: 0.1, 0.5: 0.4, 0.9: 0.9}}
    accuracies = {name: {s: 1 - v for s, v in curve.items()} for name, curve in losses.items()}
    scores = {name: torch.rand(100, generator=torch.Generator().manual_seed(0)) for name in losses}
    wanted = Allocated(losses)(scores, 0.6)
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps({"is_lower_better": False, "curves": accuracies}))
    for scope in (Allocated(accuracies, mode="max"), Allocated(str(file))):
        found = scope(scores, 0.6)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    sizes = {"a": 100, "b": 100}
    assert allocate(accuracies, sizes, 0.6, mode="max") == pytest.approx(allocate(losses, sizes, 0.6))


def test_curves_that_are_the_wrong_way_round_are_warned_of():
    accuracies = {"a": {0.0: 0.9, 0.5: 0.8}, "b": {0.0: 0.9, 0.5: 0.95}}
    with pytest.warns(
        UserWarning, match="the more of them is pruned, with mode='min'.*of accuracies more, mode='max'"
    ):
        Allocated(accuracies)
    with pytest.warns(UserWarning, match="mode='min'"):
        allocate(accuracies, {"a": 1, "b": 1}, 0.2)
    with pytest.raises(ValueError, match="`mode` is one of"):
        Allocated(accuracies, mode="best")


def test_local_guard():
    assert [
        int(m.sum()) for m in Local(min_keep=2)({"a": torch.rand(4), "b": torch.rand(100)}, 0.9).values()
    ] == [2, 10]


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_per_row_against_numpy(sparsity):
    scores = random_scores()
    masks = PerRow()(scores, sparsity)
    for name, s in scores.items():
        rows, kept = s.flatten(1).numpy(), masks[name].flatten(1).numpy()
        k = rows.shape[1] - round(rows.shape[1] * sparsity)
        for row, mask in zip(rows, kept, strict=True):
            assert set(np.flatnonzero(mask)) == set(np.argsort(-row, kind="stable")[:k])


@pytest.mark.parametrize("scope", [PerRow(), ConstantFanIn()], ids=str)
def test_rows_of_whole_slices_are_refused(scope):
    with pytest.raises(ValueError, match=rf"`scope` {type(scope).__name__} .* shape \(3,\) for `a`"):
        scope({"a": torch.rand(3)}, 0.5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_keeps_the_best_n_of_every_m_inputs(n, m):
    scores = random_scores()
    masks = NofM(n, m)(scores, 1 - n / m)
    for name, s in scores.items():
        blocks = s.movedim(1, -1).reshape(-1, m).numpy()
        kept = masks[name].movedim(1, -1).reshape(-1, m).numpy()
        assert (kept.sum(1) == n).all()
        assert (np.sort(np.where(kept, blocks, -1), 1)[:, -n:] == np.sort(blocks, 1)[:, -n:]).all()


def test_n_of_m_follows_a_schedule_exactly():
    """JaxPruner's N:M ignores its schedule."""
    scores = random_scores(shapes={"a": (10, 40)})
    for sparsity in (0.0, 0.1, 0.25, 0.4, 0.5):
        mask = NofM()(scores, sparsity)["a"]
        assert int(mask.sum()) == 400 - round(400 * sparsity)
        assert int(mask.view(-1, 4).sum(1).min()) >= 2


def test_n_of_m_refuses_or_spares_what_cannot_be_divided():
    scores = {"odd": torch.rand(4, 3), "even": torch.rand(4, 8)}
    with pytest.raises(
        ValueError, match=r"`odd`: 2:4 needs an input dim .* multiple of 4, but got shape \(4, 3\)"
    ):
        NofM()(scores, 0.5)
    scope = NofM(indivisible="dense")
    masks = scope(scores, scope.prescribed({"odd": (4, 3), "even": (4, 8)}))
    assert masks["odd"].all() and int(masks["even"].sum()) == 16


def test_erk_densities_against_the_formula():
    """density_l = min(1, eps (n_in + n_out + kh + kw) / (n_in n_out kh kw)), eps by bisection."""
    shapes = {"a": (64, 32, 3, 3), "b": (128, 64, 3, 3), "c": (10, 128)}
    masks = ERK()({n: torch.rand(s) for n, s in shapes.items()}, 0.8)
    sizes = np.array([math.prod(s) for s in shapes.values()], dtype=float)
    raw = np.array([sum(s) / math.prod(s) for s in shapes.values()])
    low, high = 0.0, 1e6
    for _ in range(200):
        eps = (low + high) / 2
        low, high = (
            (eps, high) if (np.minimum(1, eps * raw) * sizes).sum() < 0.2 * sizes.sum() else (low, eps)
        )
    found = np.array([int(m.sum()) for m in masks.values()])
    np.testing.assert_allclose(found, np.minimum(1, eps * raw) * sizes, atol=1)
    assert found.sum() == int(sizes.sum()) - round(0.8 * sizes.sum())


def test_erk_without_kernel_counts_channels_alone():
    shapes = {"a": (20, 10, 5, 5), "b": (40, 20, 1, 1)}
    masks = ERK(kernel=False)({n: torch.rand(s) for n, s in shapes.items()}, 0.9)
    densities = [float(m.float().mean()) for m in masks.values()]
    assert densities[0] / densities[1] == pytest.approx((30 / 200) / (60 / 800), rel=0.02)


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95, 0.999])
def test_constant_fan_in_is_what_erk_gives_the_layer_in_each_row(sparsity):
    scores = random_scores()
    masks, erk = ConstantFanIn()(scores, sparsity), ERK()(scores, sparsity)
    for name, mask in masks.items():
        rows, score = mask.flatten(1), scores[name].flatten(1)
        (each,) = rows.sum(1).unique().tolist()
        assert each >= 1 and abs(each - int(erk[name].sum()) / len(rows)) <= (0.6 if each > 1 else 1.0)
        assert torch.equal(rows, score >= score.topk(each, dim=1).values[:, -1:])


def test_lamp_against_the_formula():
    weights = {"a": torch.randn(20, 10), "b": 10 * torch.randn(5, 10)}
    lamp = []
    for w in weights.values():
        squares = w.double().flatten().square().numpy()
        lamp.append([x / squares[squares >= x].sum() for x in squares])
    flat = np.concatenate(lamp)
    expected = np.zeros(len(flat), dtype=bool)
    expected[np.argsort(-flat, kind="stable")[:75]] = True
    masks = LAMP()({n: w.abs() for n, w in weights.items()}, 0.7)
    assert np.array_equal(np.concatenate([m.flatten().numpy() for m in masks.values()]), expected)


@given(st.lists(st.floats(0, 1e30), max_size=40), st.sampled_from([1.0, 1e-20, 1e250]))
def test_running_sums_are_those_of_exact_addition(values, scale):
    values = sorted((value * scale for value in values), reverse=True)
    expected = [math.fsum(values[: i + 1]) for i in range(len(values))]
    found = running_sums(torch.tensor(values, dtype=torch.float64)).tolist()
    assert found == pytest.approx(expected, rel=1e-12, abs=0)


def test_running_sums_of_many_small_values_beside_a_large_one():
    values = torch.full((1_000_001,), 1e-9, dtype=torch.float64)
    values[0] = 3.0
    assert float(running_sums(values)[-1]) == pytest.approx(3.001, rel=1e-12)


def test_lamp_survives_a_layer_of_zeros_and_refuses_negative_scores():
    masks = LAMP()({"a": torch.zeros(4), "b": torch.ones(4)}, 0.5)
    assert num_kept(masks) == 4 and int(masks["a"].sum()) >= 1
    with pytest.raises(ValueError, match="negative ones for `a`"):
        LAMP()({"a": -torch.ones(3)}, 0.5)


def test_fixed_takes_the_first_match_and_leaves_the_rest_dense():
    shapes = {"enc.0.weight": (10, 10), "enc.1.weight": (10, 10), "head.weight": (5, 10)}
    scope = Fixed({"enc.1": 0.2, "enc.*": 0.8})
    masks = scope(random_scores(shapes=shapes), scope.prescribed(shapes))
    assert [int(m.sum()) for m in masks.values()] == [20, 80, 50]
    assert scope.prescribed(shapes) == pytest.approx(100 / 250)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Local(min_keep=0.2).check({"a": torch.rand(9)}, 0.9),
            r"leaves of each parameter, 0.1, but got 0.2",
        ),
        (
            lambda: Recipe(0.5, criterion=OBD(), scope=LAMP()),
            "`scope` LAMP compares scores of at least 0, but got OBD",
        ),
        (
            lambda: Recipe(0.5, criterion=Movement(), scope=OWL()),
            r"but got Movement\(\), whose scores may be negative",
        ),
        (lambda: ConstantFanIn().check({"a": torch.rand(9)}, 0.5), "ConstantFanIn compares within rows"),
        (lambda: PerRow().check({"a": torch.rand(9)}, 0.5), "PerRow compares within rows"),
        (lambda: Local(min_keep=-1), r"`min_keep` is a whole number of at least 0, but got -1"),
        (lambda: Global(min_keep=1.0), r"`min_keep` is a sparsity, .* in \[0, 1\), but got 1.0"),
        (lambda: NofM(n=4, m=4), r"n below m, but got n=4 and m=4"),
        (lambda: NofM(indivisible="denes"), r"Did you mean dense\?"),
        (lambda: Allocated({}), "`curves` has at least one, but got none"),
        (lambda: Allocated({"a": 0.5}), r"`curves\['a'\]` maps 0 and more sparsities to losses, but got 0.5"),
        (lambda: Allocated({"a": {0.5: 1.0, 0.9: 1.0}}), r"maps 0 and more sparsities"),
        (lambda: Allocated({"a": {0.0: 1.0, 1.0: 1.0}}), r"`curves\['a'\]` is a sparsity"),
        (
            lambda: Allocated({"a": {0.0: math.nan, 0.5: 1.0}}),
            r"`curves\['a'\]\[0.0\]` is a loss, but got nan",
        ),
        (
            lambda: Allocated("nowhere.json"),
            "`curves` is a sensitivity.json, but got nowhere.json: FileNotFound",
        ),
        (lambda: Allocated(3), "`curves` is a path, but got 3"),
        (lambda: CURVES({"b": torch.rand(9)}, 0.2), r"`curves` has a pattern .*'a'"),
        (
            lambda: CURVES({"a": torch.rand(9), "b": torch.rand(9)}, 0.2),
            "`curves` has one .* got none for `b`",
        ),
        (
            lambda: CURVES({"a": torch.rand(9)}, 0.8),
            "at most what the curves reach together, 0.5556, but got 0.8",
        ),
        (lambda: Fixed({}), r"`sparsities` maps at least one pattern"),
        (lambda: Fixed({"a": 1.0}), r"`sparsities\['a'\]` is a sparsity"),
        (lambda: Fixed({"re:(": 0.5}), r"bad regular expression"),
        (lambda: Fixed({"haed": 0.5})({"head.weight": torch.rand(3)}, 0.5), r"'haed'. Did you mean head\?"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
