"""Runs whose optimizers step the survivors alone end in the same bits as those that step all weights."""

import pytest
import torch

from lightning_prune import (
    Alternating,
    InitialPruning,
    Magnitude,
    SparseTraining,
    TrainTimePruning,
    WeightRewinding,
    Window,
)
from lightning_prune.callbacks import in_training
from lightning_prune.model import reach
from lightning_prune.model.reach import Reach
from tests.callbacks.toy import GAN, Toy, Witness, data, trainer


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Small layers will do, at any density and from one step to the next."""
    monkeypatch.setattr(reach, "ELEMENTWISE", dict.fromkeys(reach.ELEMENTWISE, Reach(1.0, 1)))
    monkeypatch.setattr(in_training, "RESTFUL", 1)


CALLBACKS = {
    "train-time": lambda **o: TrainTimePruning(0.8, window=Window(end=0.6, every=0.1), report=False, **o),
    "alternating": lambda **o: TrainTimePruning(0.8, schedule=Alternating(num_phases=4), report=False, **o),
    "sparse": lambda **o: SparseTraining(0.7, window=Window(end=0.8, every=0.1), report=False, **o),
    "initial": lambda **o: InitialPruning(0.7, criterion=Magnitude(), report=False, **o),
    "rewinding": lambda **o: WeightRewinding(0.7, num_levels=2, report=False, **o),
}


class Sizes(Witness):
    """Counts the steps after which the optimizers hold less than the weights are."""

    def __init__(self, callback):
        super().__init__(callback)
        self.compact = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        held = {
            p.shape != v.shape
            for optimizer in trainer.optimizers
            for p, state in optimizer.state.items()
            for v in state.values()
            if torch.is_tensor(v) and v.dim()
        }
        self.compact += any(held)


def fit(name, module, *, compact, **options):
    callback = CALLBACKS[name](compact=compact)
    sizes = Sizes(callback)
    fitted = trainer(callback, sizes, **options)
    torch.manual_seed(7)
    fitted.fit(module, data(shuffle=True), None if isinstance(module, GAN) else data())
    assert sizes.violations == 0
    assert bool(sizes.compact) == compact
    states = [optimizer.state_dict()["state"] for optimizer in fitted.optimizers]
    assert all(v.shape == w.shape for o in fitted.optimizers for w, s in o.state.items() for v in _tensors(s))
    return module.state_dict(), callback.masks, states


def _tensors(state):
    return [value for value in state.values() if torch.is_tensor(value) and value.dim()]


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (Toy, {}),
        (lambda: Toy("SGD", momentum=0.9, nesterov=True), {"gradient_clip_val": 0.1}),
        (Toy, {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}),
    ],
    ids=["adamw", "sgd-clip", "accumulate-mixed"],
)
def test_the_run_is_the_same_bit_for_bit(name, build, options):
    length = {"max_epochs": 2 if name == "rewinding" else 4}
    (ours, masks, _), (whole, same, _) = (
        fit(name, build(), compact=way, **options, **length) for way in (True, False)
    )
    assert all(torch.equal(masks[name], same[name]) for name in masks)
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["compact", "report"])
def test_a_word_is_no_flag(name):
    with pytest.raises(ValueError, match=f"`{name}` is True or False, but got 'no'"):
        TrainTimePruning(0.5, **{name: "no"})


def test_two_optimizers_by_hand_are_followed_each():
    (ours, _, _), (whole, _, _) = (fit("train-time", GAN(), compact=way) for way in (True, False))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
