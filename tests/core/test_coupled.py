"""Granularities of coupled groups, and budgets: their ranges, and what a recipe refuses."""

import pytest

from lightning_prune import Budget, Channel, Global, Head, Layer, Local, Magnitude, NofM, Weight
from lightning_prune.core.recipe import Recipe, checked_shrink


@pytest.mark.parametrize(
    ("granularity", "pruned"),
    [
        (Channel(), {"channel", "head_dim"}),
        (Channel(heads="whole"), {"channel", "head"}),
        (Channel(heads="keep"), {"channel"}),
        (Head(), {"head"}),
        (Layer(), {"block"}),
    ],
)
def test_each_prunes_its_roles(granularity, pruned):
    roles = ("channel", "head", "head_dim", "part", "block")
    assert {role for role in roles if granularity.prunes(role)} == pruned


@pytest.mark.parametrize(("size", "step"), [(3, 1), (8, 2), (31, 4), (32, 8), (512, 8)])
def test_channels_come_in_multiples_where_there_are_many(size, step):
    assert Channel().step(size) == step
    assert Channel(multiple_of=1).step(size) == Head().step(size) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Channel(reduction="median"), "`reduction` is one of"),
        (lambda: Channel(normalize="sum"), "`normalize` is one of"),
        (lambda: Channel(heads="wide"), "`heads` is one of"),
        (lambda: Channel(multiple_of=0), "`multiple_of` is"),
        (lambda: Channel(min_keep=1.0), "`min_keep` is"),
        (lambda: Head(min_keep=-1), "`min_keep` is"),
        (lambda: Layer(min_keep=-1), "`min_keep` is"),
        (lambda: Layer(reduction="median"), "`reduction` is one of"),
        (
            lambda: Recipe(0.5, granularity=Layer(), scope=Local()),
            "`scope` of blocks is Global.., .* but got Local",
        ),
        (
            lambda: Recipe(0.5, granularity=Layer(), scope=Global(min_keep=2)),
            "but got Global.min_keep=2. with Layer",
        ),
        (lambda: Recipe({"*": 0.5}, granularity=Layer()), "`scope` of blocks is Global.., .* but got Fixed"),
        (
            lambda: Recipe(0.5, granularity=Layer(reduction="sum")),
            "`reduction` is of the scores of a `criterion`",
        ),
        (lambda: Budget(), "`budget` is exactly one of .* but got none"),
        (lambda: Budget(params=0.5, macs=0.5), "`budget` is exactly one of"),
        (
            lambda: Budget(params=1.0),
            "`params` is a fraction of the dense model's cost, in .0, 1., but got 1.0",
        ),
        (lambda: Budget(latency=0), "`latency` is a fraction"),
        (lambda: Budget(macs=0.5, tolerance=0.0), "`tolerance` is a fraction"),
        (
            lambda: Recipe(0.5, granularity=Channel(), budget=Budget(macs=0.5)),
            "`budget` takes the place of `sparsity`",
        ),
        (
            lambda: Recipe(granularity=Channel(), scope=NofM(), budget=Budget(macs=0.5)),
            "`budget` takes the place of",
        ),
        (
            lambda: Recipe(granularity=Weight(), budget=Budget(macs=0.5)),
            "`budget` is for granularities that make",
        ),
        (lambda: Recipe(granularity=Channel()), "`sparsity` is the fraction removed"),
        (lambda: checked_shrink("end", Weight()), "`shrink` is for granularities of coupled groups"),
        (lambda: checked_shrink("ever", Channel()), "`shrink` is one of"),
        (lambda: checked_shrink(None, Layer()), "`granularity` Layer takes out whole blocks at once"),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_shrinks_at_the_end_unless_told_otherwise():
    assert checked_shrink(None, Channel()) == "end"
    assert checked_shrink("update", Head()) == "update"
    assert checked_shrink(None, Weight()) is None


def test_a_budget_says_what_it_limits():
    assert (Budget(latency=0.6).kind, Budget(latency=0.6).fraction) == ("latency", 0.6)
    assert str(Budget(macs=0.5)) == "Budget(macs=0.5)"
    assert str(Budget(params=0.5, tolerance=0.1)) == "Budget(params=0.5, tolerance=0.1)"


def test_a_recipe_says_by_what_blocks_are_ranked():
    assert Recipe(0.5, granularity=Layer()).describe()["criterion"] == "block influence"
    assert Recipe(0.5, Magnitude(p=2), Layer(reduction="sum")).describe()["criterion"] == "Magnitude(p=2)"
    assert Recipe(0.5, granularity=Channel()).describe()["criterion"] == str(Magnitude())
