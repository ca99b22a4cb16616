"""Steps that read more of a model than its calls show: what they need stays whole, and is told of before training."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import Budget, Channel, InitialPruning, PostTrainingPruning, TrainTimePruning
from lightning_prune.callbacks import base
from tests.callbacks.toy import Toy, data, trainer

CHANNELS = {"granularity": Channel(multiple_of=1), "report": False}
CALLBACKS = {
    "at each update": lambda: TrainTimePruning(0.5, shrink="update", **CHANNELS),
    "at the end": lambda: TrainTimePruning(0.5, **CHANNELS),
    "before": lambda: InitialPruning(0.5, **CHANNELS),
    "after": lambda: PostTrainingPruning(0.5, **CHANNELS),
}


class Orthogonal(Toy):
    """Uses a weight outside of any call, in a way that follows."""

    def training_step(self, batch, batch_idx):
        weight = self.body[0].weight
        return super().training_step(batch, batch_idx) + 1e-3 * (weight @ weight.t()).square().sum()


class Anchored(Toy):
    """Is drawn to what the last layer was at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchor", self.head.weight.detach().clone())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.head.weight - self.anchor).square().sum()


class OtherFeatures(Toy):
    """Validates by features, against a bank of their width."""

    def validation_step(self, batch, batch_idx):
        bank = torch.ones(3, 8)
        self.log("val/similarity", (self.body(batch[0]) @ bank.t()).mean())


class Penalised(Toy):
    """Reads all its weights, whatever their sizes: nothing of that is in the way."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 1e-4 * sum(p.abs().sum() for p in self.parameters())


def widths(module):
    return module.body[0].out_features, module.body[4].out_features


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize(
    ("kind", "group", "step"),
    [
        (Anchored, "body.4.weight", "training_step"),
        (OtherFeatures, "body.4.weight", "validation_step"),
    ],
)
def test_what_a_step_reads_at_its_whole_width_stays_whole(kind, group, step, name):
    module = kind()
    with pytest.warns(UserWarning, match=f"`{group}` stays whole, since `{step}` fails once it is smaller"):
        trainer(CALLBACKS[name]()).fit(module, data(), data())
    first, second = widths(module)
    assert second == 8 and first < 16


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("kind", [Orthogonal, Penalised])
def test_what_follows_all_the_same_becomes_smaller_without_a_word(kind, name, recwarn):
    module = kind()
    trainer(CALLBACKS[name]()).fit(module, data(), data())
    assert sum(widths(module)) < 20
    assert not [w for w in recwarn if "stays whole" in str(w.message)]


@pytest.mark.parametrize("name", CALLBACKS)
def test_trying_leaves_no_trace(name, monkeypatch):
    """The run is that of a module whose steps are not tried, bit for bit, random states too."""
    found = []
    for is_tried in (True, False):
        if not is_tried:
            monkeypatch.setattr(base, "keep_what_steps_need", lambda *_: ())
        trainer(CALLBACKS[name]()).fit(module := Penalised(), data(shuffle=True), data())
        found.append((module.state_dict(), torch.get_rng_state(), module.training))
    assert found[0][0].keys() == found[1][0].keys() and found[0][2] == found[1][2]
    assert all(torch.equal(t, found[1][0][n]) for n, t in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_a_step_that_fails_as_it_is_tells_nothing():
    class Apart(Toy):
        def validation_step(self, batch, batch_idx):
            if self.trainer.training:
                raise RuntimeError("no batch of validation")

    module = Apart()
    trainer(CALLBACKS["at the end"]()).fit(module, data(), data())
    assert sum(widths(module)) < 20


def test_a_resumed_run_leaves_whole_what_the_first_one_did(tmp_path):
    def run(name, ckpt_path=None):
        saved = ModelCheckpoint(tmp_path, name + "-" + "{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(CALLBACKS["at each update"](), saved, default_root_dir=tmp_path / name)
        fit.fit(module := Anchored(), data(), data(), ckpt_path=ckpt_path)
        return module

    with pytest.warns(UserWarning, match="stays whole"):
        whole = run("whole")
    for step in (1, 11):
        resumed = run(f"{step}", tmp_path / f"whole-step={step}.ckpt")
        assert widths(resumed) == widths(whole) and widths(whole)[1] == 8
        assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


@pytest.mark.filterwarnings("ignore:Very little is left of `body.4.weight`")
def test_a_budget_that_is_out_of_reach_then_is_refused_before_the_first_step():
    fit = trainer(TrainTimePruning(budget=Budget(params=0.12), **CHANNELS))
    with pytest.raises(ValueError, match="is out of reach"):
        fit.fit(Anchored(), data(), data())
    assert fit.global_step == 0
    fit = trainer(TrainTimePruning(budget=Budget(params=0.12), **CHANNELS))
    fit.fit(module := Toy(), data(), data())
    assert fit.global_step == 24 and widths(module)[1] < 8


class Deep(Toy):
    """Blocks alike, each drawn to what it was at first."""

    def __init__(self, num=6):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(num)
        )
        self.anchors = [block[0].weight.detach().clone() for block in self.blocks]
        self.num_steps = torch.zeros(())

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return super().forward(x)

    def training_step(self, batch, batch_idx):
        self.num_steps.add_(1)
        loss = super().training_step(batch, batch_idx)
        for block, anchor in zip(self.blocks, self.anchors, strict=True):
            loss = loss + (block[0].weight - anchor).square().sum()
        return loss


def test_the_third_of_a_kind_is_not_looked_for(recwarn):
    module = Deep(12)
    fit = trainer(TrainTimePruning(0.5, **CHANNELS), max_epochs=1)
    fit.fit(module, data(), data())
    told = [str(w.message) for w in recwarn if "stays whole" in str(w.message)]
    assert len(told) == 13  # the last layer of the body is of that kind as well
    assert all(block[0].out_features == 12 for block in module.blocks) and module.body[4].out_features == 8
    assert module.body[0].out_features < 16
    assert float(module.num_steps) < 6 + 2 + 2 * (2 + 4 + 1)


class Recurrent(Toy):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8)

    def forward(self, x):
        return self.head(self.body(self.rnn(x[None])[0][0]))


def test_recurrent_layers_are_tried_with_their_smaller_weights(recwarn):
    module = Recurrent()
    callback = TrainTimePruning(0.5, include=["rnn", "body"], **CHANNELS)
    trainer(callback).fit(module, data(), data())
    assert module.rnn.hidden_size < 8
    assert not [w for w in recwarn if "stays whole" in str(w.message)]
