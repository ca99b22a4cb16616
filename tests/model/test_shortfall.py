"""Less than what was asked for goes never unsaid: by how much, where, and what to change."""

import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_prune import (
    Channel,
    Local,
    Magnitude,
    PostTrainingPruning,
    Slice,
    TrainTimePruning,
    preview,
    prune,
    shrink,
)
from lightning_prune.examples.data import Digits
from lightning_prune.examples.tasks import Classifier
from tests.callbacks.toy import Toy, data, trainer

LEAST = (
    r"`sparsity` of 0.99 is missed: 0.\d+ of the \d+ channels or heads are gone. Groups that keep the least"
)


def net(*sizes):
    torch.manual_seed(0)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_what_multiples_leave_is_said_with_the_layers_and_the_setting():
    with pytest.warns(UserWarning, match="is missed") as said:
        shrink(net(16, 12, 8, 10), torch.ones(2, 16), 0.99, scope=Local())
    assert [str(w.message) for w in said] == [
        "`sparsity` of 0.99 is missed: 0.8 of the 20 channels or heads are gone. Groups that keep the least that they "
        "may: `0.weight` (2 of 12), `2.weight` (2 of 8). `multiple_of` below 8 would let them keep other numbers."
    ]


def test_what_min_keep_leaves_is_said():
    granularity = Channel(min_keep=0.5, multiple_of=1)
    with pytest.warns(UserWarning, match=r"0.5 of the 28 .*`0.weight` \(8 of 16\).*less than `min_keep` 0.5"):
        shrink(net(16, 16, 12, 10), torch.ones(2, 16), 0.7, scope=Local(), granularity=granularity)


def test_rounding_that_moves_much_is_said():
    with pytest.warns(UserWarning, match=r"0.5 of the 64 .*sizes were rounded: `0.weight` \(32 of 64\)"):
        shrink(net(16, 64, 10), torch.ones(2, 16), 0.6, granularity=Channel(multiple_of=32))


def test_layers_with_few_rows_are_said():
    with pytest.warns(UserWarning, match="is missed") as said:
        prune(net(16, 2, 4, 10), 0.95, granularity=Slice(dim=0), scope=Local())
    assert [str(w.message) for w in said] == [
        "`sparsity` of 0.95 is missed: 0.8125 of the 16 groups are gone, as near as `scope` Local(min_keep=1) comes "
        "with so few: `0.weight` (1 of 2), `2.weight` (1 of 4), `4.weight` (1 of 10)."
    ]


def test_nothing_is_said_where_the_goal_is_near():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = shrink(net(16, 32, 32, 10), torch.ones(2, 16), 0.7, scope=Local())
        masks = prune(net(4, 100, 3), 0.9, granularity=Slice(dim=0), scope=Local(), exclude=["2"])
    assert small is not None and masks["0.weight"].any(1).sum() == 10


@pytest.mark.parametrize("kind", [TrainTimePruning, PostTrainingPruning])
def test_a_run_says_it_once_and_notes_it(kind):
    callback = kind(0.99, granularity=Channel(), scope=Local(), criterion=Magnitude(), report=False)
    with pytest.warns(UserWarning, match=LEAST):
        trainer(callback, max_epochs=2).fit(Toy(), data(), data())
    assert len(callback.warnings) == 1 and "`multiple_of` below 8" in callback.warnings[0]


def test_a_preview_notes_it_and_is_fine():
    callback = TrainTimePruning(0.99, granularity=Channel(), scope=Local(), report=False)
    found = preview(callback, Classifier("MLP", sizes=[64, 12, 8, 10]), Digits(), trainer(logger=False))
    assert found.is_fine, found.troubles
    assert any("`sparsity` of 0.99 is missed" in note for note in found.notes)
