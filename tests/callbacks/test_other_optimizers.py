"""Optimizers that are put in the place of others in mid-training: masks hold at once, and their steps count."""

import copy

import pytest
import torch

from lightning_prune import (
    Channel,
    InitialPruning,
    Saliency,
    SparseTraining,
    StraightThrough,
    TrainTimePruning,
    WeightRewinding,
    Window,
)
from lightning_prune.callbacks import in_training
from lightning_prune.model import reach
from lightning_prune.model.reach import Reach
from tests.callbacks.toy import GAN, NUM_BATCHES, Toy, Witness, data, trainer

OFTEN = {"window": Window(end=0.8, every=0.1), "report": False}
CALLBACKS = {
    "train-time": lambda **o: TrainTimePruning(0.8, **OFTEN, **o),
    "saliency": lambda **o: TrainTimePruning(0.8, criterion=Saliency(), **OFTEN, **o),
    "soft": lambda **o: TrainTimePruning(0.8, masking=StraightThrough(), **OFTEN, **o),
    "sparse": lambda **o: SparseTraining(0.8, **OFTEN, **o),
    "initial": lambda **o: InitialPruning(0.8, report=False, **o),
    "rewinding": lambda **o: WeightRewinding(0.8, num_levels=1, report=False, **o),
    "channels": lambda **o: TrainTimePruning(
        0.5, granularity=Channel(multiple_of=1), shrink="never", **OFTEN, **o
    ),
}


def set_up_anew(fit):
    fit.strategy.setup_optimizers(fit)


def replace(fit):
    """By an optimizer that goes on with the state of the one before."""
    (before,) = fit.optimizers
    other = torch.optim.AdamW(fit.lightning_module.parameters(), 1e-3)
    other.load_state_dict(copy.deepcopy(before.state_dict()))
    fit.optimizers = [other]


class Changing(Toy):
    """Gets other optimizers in one of its own hooks, which come after those of the callbacks."""

    def __init__(self, hook, change):
        super().__init__()
        self.change, self.old = change, []
        setattr(self, hook, self.look)

    def look(self, *_):
        if self.trainer.global_step >= NUM_BATCHES + self.current_epoch and not self.old:
            self.old += self.trainer.optimizers
            self.change(self.trainer)


class AfterSteps(Witness):
    """Looks when a step is done: a model with other hooks cannot be traced."""

    def setup(self, trainer, pl_module, stage):
        pass

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.look(pl_module)


HOOKS = ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"]


def run(name, hook, change, **options):
    callback, module = CALLBACKS[name](**options), Changing(hook, change)
    witness = (AfterSteps if name == "channels" else Witness)(callback)
    fit = trainer(callback, witness, max_epochs=4)
    torch.manual_seed(7)
    fit.fit(module, data(shuffle=True), data())
    return fit, module, callback, witness


@pytest.mark.parametrize("change", [set_up_anew, replace])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_masks_hold_at_once_and_steps_count(name, hook, change):
    fit, module, callback, witness = run(name, hook, change)
    assert len(module.old) == 1 and fit.optimizers[0] is not module.old[0]
    assert witness.reads > NUM_BATCHES and witness.violations == 0
    assert (
        callback.ramp.num_steps == fit.global_step == 4 * NUM_BATCHES * (1 + (name == "rewinding"))
        and callback.is_final
    )
    assert callback.pruner.sparsity == pytest.approx(0.5 if name == "channels" else 0.8, abs=0.05)
    for optimizer in (*module.old, *fit.optimizers):
        assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
        for weight, state in optimizer.state.items():
            assert all(v.shape == weight.shape for v in state.values() if v.dim()) or optimizer in module.old


@pytest.mark.parametrize("change", [set_up_anew, replace])
@pytest.mark.parametrize("hook", HOOKS[:3])
@pytest.mark.parametrize("name", ["train-time", "sparse", "initial"])
def test_steps_of_the_survivors_alone_go_on_bit_for_bit(name, hook, change, monkeypatch):
    """Not where they are exchanged while one steps: what is copied there may remember what is grown in that step."""
    monkeypatch.setattr(reach, "ELEMENTWISE", dict.fromkeys(reach.ELEMENTWISE, Reach(1.0, 1)))
    monkeypatch.setattr(in_training, "RESTFUL", 1)
    (_, module, *_), (_, expected, *_) = (
        run(name, hook, change, compact=compact) for compact in (True, False)
    )
    for key, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


def test_one_of_several_optimizers_is_replaced():
    class Fresh(GAN):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                generator, _ = self.trainer.optimizers
                fresh = torch.optim.Adam(self.discriminator.parameters(), 1e-2)
                self.trainer.optimizers = [generator, fresh]

    callback = TrainTimePruning(0.5, **OFTEN)
    witness = Witness(callback)
    trainer(callback, witness).fit(Fresh(), data())
    assert witness.reads and witness.violations == 0 and callback.ramp.num_steps == 4 * NUM_BATCHES
