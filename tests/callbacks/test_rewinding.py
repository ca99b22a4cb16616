"""Rewinding: each level is a training of its own from the snapshot, with masks of the one before."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR

from lightning_prune import Channel, Saliency, WeightRewinding
from lightning_prune.model.rewind import rewind_, take
from tests.callbacks.test_resume import DyingCheckpoint, in_a_process_that_dies
from tests.callbacks.toy import NUM_BATCHES, Toy, data, trainer

LENGTH = 2  # epochs of one training


class Scheduled(Toy):
    """With a learning rate for each step, and a diary of both."""

    def __init__(self, **options):
        super().__init__(**options)
        self.diary = []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, *_):
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.diary.append((lr, copy.deepcopy(self.state_dict())))


def fit(callback, *others, module=Scheduled, ckpt_path=None, **options):
    trained = module()
    torch.manual_seed(7)
    fitted = trainer(callback, *others, **{"max_epochs": LENGTH, **options})
    fitted.fit(trained, data(shuffle=True), data(), ckpt_path=ckpt_path)
    return fitted, trained


def build(**options):
    return WeightRewinding(**{"sparsity": 0.75, "num_levels": 2, "report": False, **options})


def test_each_level_starts_at_the_initialisation_with_fewer_weights():
    callback = build()
    fitted, trained = fit(callback)
    steps = LENGTH * NUM_BATCHES
    assert len(trained.diary) == 3 * steps
    first = trained.diary[0][1]
    for level, sparsity in ((1, 0.5), (2, 0.75)):
        lr, start = trained.diary[level * steps]
        assert lr == trained.diary[0][0]
        pruned = total = 0
        for name in callback.masks:
            kept = start[name] != 0
            assert torch.equal(start[name][kept], first[name][kept])
            pruned, total = pruned + int((~kept).sum()), total + kept.numel()
        assert pruned == round(sparsity * total)
        others = [name for name in first if name not in callback.masks]
        assert all(torch.equal(start[name], first[name]) for name in others)  # biases, batch norm
    assert [found["sparsity"] for found in callback.levels] == pytest.approx([0.0, 0.5, 0.75], abs=1e-3)
    assert all("val/loss" in found for found in callback.levels)
    assert fitted.max_epochs == LENGTH  # its own length again


def test_a_schedule_that_asks_for_the_length_of_the_run_gets_that_of_one_training():
    class Asks(Scheduled):
        def configure_optimizers(self):
            self.length = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    _, trained = fit(build(), module=Asks)
    assert trained.length == LENGTH * NUM_BATCHES and len(trained.diary) == 3 * trained.length


def test_what_is_pruned_is_what_training_left_smallest():
    callback = build(num_levels=1, sparsity=0.5)
    kept = {}

    class Ends(Scheduled):
        def on_train_epoch_end(self):
            if self.trainer.current_epoch == LENGTH - 1:
                kept.update({n: p.detach().abs().clone() for n, p in self.named_parameters() if p.dim() > 1})

    fit(callback, module=Ends)
    values = torch.cat([kept[name].flatten() for name in callback.masks])
    threshold = values.sort(descending=True).values[(len(values) - round(0.5 * len(values))) - 1]
    assert all(torch.equal(mask, kept[name] >= threshold) for name, mask in callback.masks.items())


def test_it_goes_back_to_an_early_epoch():
    callback = build(epoch=1)
    _, trained = fit(callback)
    steps = NUM_BATCHES
    assert len(trained.diary) == (LENGTH + 2) * steps  # the levels train for one epoch each
    early = trained.diary[steps]
    for start in (trained.diary[2 * steps], trained.diary[3 * steps]):
        assert start[0] == early[0] < trained.diary[0][0]
        for name in callback.masks:
            kept = start[1][name] != 0
            assert torch.equal(start[1][name][kept], early[1][name][kept])


def test_learning_rate_rewinding_keeps_what_was_learned():
    callback = build(rewind="learning_rate")
    _, trained = fit(callback)
    steps = LENGTH * NUM_BATCHES
    (lr, start), (_, last) = trained.diary[steps], trained.diary[steps - 1]
    assert lr == trained.diary[0][0]
    moved = (start["body.0.bias"] - last["body.0.bias"]).abs().max()
    assert 0 < moved < 0.1 and not torch.equal(start["body.0.bias"], trained.diary[0][1]["body.0.bias"])


@pytest.mark.parametrize("options", [{}, {"epoch": 1}, {"rewind": "learning_rate"}], ids=str)
@pytest.mark.parametrize("kill_at", [3, 12, 13, 20])
def test_a_killed_run_goes_on_bit_for_bit_at_any_level(options, kill_at, tmp_path):
    def run(folder, kill_at=None, ckpt_path=None):
        callback = build(**options)
        _, trained = fit(callback, DyingCheckpoint(folder, kill_at), ckpt_path=ckpt_path)
        return callback, trained

    whole, reference = run(tmp_path / "whole")
    in_a_process_that_dies(lambda: run(tmp_path, kill_at))
    resumed, trained = run(tmp_path, ckpt_path=tmp_path / f"step={kill_at}.ckpt")
    assert resumed.level == 2
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    assert [found["sparsity"] for found in resumed.levels] == [found["sparsity"] for found in whole.levels]
    assert resumed.levels[-1]["val/loss"] == whole.levels[-1]["val/loss"]


def test_the_checkpoint_at_the_end_of_a_level_holds_what_was_trained(tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callback = build()
    _, trained = fit(callback, every)
    saved = torch.load(tmp_path / f"epoch={2 * LENGTH - 1}.ckpt", weights_only=True)
    state = saved["callbacks"]["WeightRewinding"]
    zeros = {name: int((saved["state_dict"][name] == 0).sum()) for name in callback.masks}
    total = sum(mask.numel() for mask in callback.masks.values())
    assert state["level"] == 1 and sum(zeros.values()) == round(0.5 * total)
    start = trained.diary[LENGTH * NUM_BATCHES][1]
    assert not torch.equal(saved["state_dict"]["head.bias"], start["head.bias"])


def test_a_snapshot_shares_no_memory_with_the_run():
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    snapshot, before = take(module, [optimizer], []), copy.deepcopy(module.state_dict())
    for _ in range(2):  # it can be used again
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert not torch.equal(module.weight, before["weight"])
        rewind_(snapshot, module, [optimizer], [])
        assert torch.equal(module.weight, before["weight"])
        assert float(optimizer.state[module.weight]["step"]) == 1.0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_levels": 0}, "`num_levels`"),
        ({"rewind": "weight"}, "`rewind` .* Did you mean weights"),
        (
            {"criterion": Saliency()},
            r"`criterion` reads \['name', 'weight'\] of weights between two trainings",
        ),
        ({"granularity": Channel()}, "`granularity` is one of single tensors"),
        ({"sparsity": 1.5}, "`sparsity`"),
    ],
)
def test_bad_settings_are_refused_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        build(**options)


def test_a_trainer_that_does_not_count_epochs_is_refused():
    with pytest.raises(ValueError, match="`max_epochs` is the length of one training"):
        fit(build(), max_epochs=-1, max_steps=5)
    with pytest.raises(ValueError, match="`epoch` is one of the first training's 2, but got 2"):
        fit(build(epoch=2))


def test_a_run_that_stops_early_says_so():
    class Stops(Scheduled):
        def on_train_epoch_end(self):
            self.trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"Training stopped in level 0 of 2: sparsity is 0\.0000"):
        fit(build(), module=Stops)
