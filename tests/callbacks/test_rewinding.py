"""Rewinding: each level is a training of its own from the snapshot, with masks of the one before."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import IterableDataset

from lightning_prune import Channel, Saliency, WeightRewinding
from lightning_prune.callbacks.random_state import RandomState
from lightning_prune.examples.loading import ResumableLoader
from lightning_prune.model.rewind import rewind_, take
from tests.callbacks.test_resume import DyingCheckpoint, in_a_process_that_dies
from tests.callbacks.toy import GAN, NUM_BATCHES, Toy, data, trainer

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


def fit(callback, *others, module=Scheduled, ckpt_path=None, loader=ResumableLoader, **options):
    trained = module()
    torch.manual_seed(7)
    fitted = trainer(callback, *others, **{"max_epochs": LENGTH, **options})
    batches = data(shuffle=True)
    batches.__class__ = loader
    fitted.fit(trained, batches, data(), ckpt_path=ckpt_path)
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


class ByEpoch(Toy):
    """With a learning rate for each epoch, and a diary of both."""

    diary: list

    def configure_optimizers(self):
        self.diary = []
        optimizer = super().configure_optimizers()
        return [optimizer], [LambdaLR(optimizer, lambda epoch: 1.0 / (1 + epoch))]

    on_train_batch_start = Scheduled.on_train_batch_start


class OneCycle(ByEpoch):
    """With a schedule that refuses to be stepped beyond its length."""

    def configure_optimizers(self):
        self.diary = []
        optimizer = Toy.configure_optimizers(self)
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def dense_after(step, module=Scheduled, **options):
    """A run that prunes nothing, and ends after so many steps."""

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == step

    return fit(RandomState(), Stops(), module=module, **options)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("module", [Scheduled, ByEpoch, OneCycle])
@pytest.mark.parametrize("step", [1, 3, 8, 11])
def test_it_goes_back_to_a_step_and_trains_the_steps_that_were_left(step, module):
    callback, steps = build(step=step), LENGTH * NUM_BATCHES
    fitted, trained = fit(callback, module=module)
    dense, same = dense_after(step, module)
    assert_equal(callback.snapshot["module"], same.state_dict())
    for key, state in dense.optimizers[0].state_dict()["state"].items():
        assert_equal(callback.snapshot["optimizers"][0]["state"][key], state)
    rates = [lr for lr, _ in trained.diary]
    left = steps - step
    assert rates == rates[:steps] + 2 * rates[step:steps] and fitted.global_step == steps + 2 * left
    for level in (1, 2):
        start = trained.diary[steps + (level - 1) * left][1]
        for name, tensor in callback.snapshot["module"].items():
            kept = start[name] != 0 if name in callback.masks else torch.ones_like(tensor, dtype=torch.bool)
            assert torch.equal(start[name], torch.where(kept, tensor, 0))
    assert [found["sparsity"] for found in callback.levels] == pytest.approx([0.0, 0.5, 0.75], abs=1e-3)


def test_a_level_starts_with_the_masks_times_the_snapshot():
    class Masks(L.Callback):
        """Those of each level when it begins, and the weights."""

        def __init__(self):
            self.found = []

        def on_before_zero_grad(self, trainer, module, _):
            level = callback.level
            if level == len(self.found) + 1:
                self.found.append((copy.deepcopy(module.state_dict()), dict(callback.masks)))

    callback, seen = build(step=3), Masks()
    fit(callback, seen)
    assert len(seen.found) == 2
    for weights, masks in seen.found:
        for name, mask in masks.items():
            assert torch.equal(weights[name], callback.snapshot["module"][name] * mask)


@pytest.mark.parametrize(("step", "epoch"), [(0, 0), (NUM_BATCHES, 1)])
def test_a_step_at_which_an_epoch_begins_is_that_epoch(step, epoch):
    by_step, by_epoch = build(step=step), build(epoch=epoch)
    (_, first), (_, second) = fit(by_step), fit(by_epoch)
    assert_equal(first.state_dict(), second.state_dict())
    assert by_step.levels == by_epoch.levels and len(first.diary) == len(second.diary)


def test_steps_are_those_of_the_optimizer_where_gradients_accumulate():
    callback = build(step=1)
    fitted, _ = fit(callback, accumulate_grad_batches=4)  # two steps an epoch, of four batches and of two
    _, same = dense_after(1, accumulate_grad_batches=4)
    assert_equal(callback.snapshot["module"], same.state_dict())
    assert fitted.global_step == 4 + 2 * 3


def test_the_first_epoch_of_a_level_is_short_and_ends_as_any_other():
    class Lengths(L.Callback):
        def __init__(self):
            self.found, self.ends = [], 0

        def on_train_epoch_start(self, trainer, *_):  # as a progress bar asks
            self.found.append((trainer.num_training_batches, trainer.max_epochs))

        def on_validation_end(self, trainer, *_):
            self.ends += not trainer.sanity_checking

    seen, callback = Lengths(), build(step=8)
    fitted, trained = fit(callback, seen)
    assert [num for num, _ in seen.found] == [6, 6, 4, 4] and seen.found[-1][1] == 4 == seen.ends
    (found,) = fitted.validate(trained, data(), verbose=False)
    assert callback.levels[-1]["val/loss"] == pytest.approx(found["val/loss"])
    seen = Lengths()
    fit(build(step=3), seen, max_epochs=3, val_check_interval=4)
    assert [num for num, _ in seen.found] == [6, 6, 6, 3, 6, 6, 3, 6, 6] and seen.ends == 9


@pytest.mark.parametrize(
    "options", [{}, {"epoch": 1}, {"rewind": "learning_rate"}, {"step": 3}, {"step": 7}], ids=str
)
@pytest.mark.parametrize("kill_at", [3, 12, 13, 15, 20])
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


class OfNoEpoch(ResumableLoader):
    """Goes on behind the batches that it has handed out last, in whichever epoch, as most loaders do."""

    _epoch = 0

    def load_state_dict(self, state_dict):
        super().load_state_dict({"epoch": 0, "num_done": state_dict["num_done"] % NUM_BATCHES})


@pytest.mark.parametrize("loader", [ResumableLoader, OfNoEpoch])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
def test_a_run_goes_on_bit_for_bit_where_a_short_epoch_ended(hook, loader, tmp_path):
    saving, whole = Checkpoint(), build(step=3)
    setattr(
        saving, hook, lambda trainer, *_: trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
    )
    _, reference = fit(whole, saving, loader=loader, enable_checkpointing=True)
    for step in (
        12,
        15,
        21,
        24,
    ):  # the first training's end, and those of each level's short epoch and of a whole one
        callback = build(step=3)
        _, trained = fit(callback, ckpt_path=tmp_path / f"{step}.ckpt", loader=loader)
        assert_equal(reference.state_dict(), trained.state_dict())
        assert_equal(dict(whole.masks), dict(callback.masks))
        assert_equal(whole.snapshot["module"], callback.snapshot["module"])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:`step` was 3")
def test_where_it_goes_back_to_can_be_changed_only_before_it_was_there(tmp_path):
    fit(build(step=3), DyingCheckpoint(tmp_path))
    _, same = dense_after(4)
    callback = build(step=4)
    fit(callback, DyingCheckpoint(tmp_path / "changed"), ckpt_path=tmp_path / "step=2.ckpt")
    assert_equal(callback.snapshot["module"], same.state_dict())
    for options, got in (({"step": 8}, "step 8"), ({}, "epoch 0")):
        match = f"`epoch` or `step` is that of the run that is resumed, step 3, .* but got {got}"
        with pytest.raises(ValueError, match=match):
            fit(build(**options), DyingCheckpoint(tmp_path / "changed"), ckpt_path=tmp_path / "step=4.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_dense_run_is_gone_on_from_if_the_step_is_ahead(tmp_path):
    fit(DyingCheckpoint(tmp_path), RandomState())
    _, same = dense_after(9)
    callback = build(step=9)
    fit(callback, ckpt_path=tmp_path / "step=7.ckpt")
    assert_equal(callback.snapshot["module"], same.state_dict())
    for options, said in (
        ({"step": 3}, "`step` .* in epoch 1 after 7 steps, but got 3"),
        ({}, "`epoch` .*got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(build(**options), ckpt_path=tmp_path / "step=7.ckpt")


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
        ({"step": -1}, "`step` is a whole number of at least 0, but got -1"),
        (
            {"step": 1, "epoch": 1},
            "`step` takes the place of `epoch`, .* got step=1 and epoch=1: set epoch=0",
        ),
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


@pytest.mark.parametrize(
    ("options", "last"), [({}, 11), ({"max_epochs": 3}, 17), ({"accumulate_grad_batches": 4}, 3)], ids=str
)
def test_a_step_beyond_the_first_training_is_refused_before_the_first_step(options, last):
    module = Scheduled()
    match = f"`step` is one of the first training's, from 0 to {last}, but got {last + 1}"
    with pytest.raises(ValueError, match=match):
        fit(build(step=last + 1), module=lambda: module, **options)
    assert module.diary == []


def test_a_step_of_a_run_whose_length_nobody_knows_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from data().dataset

    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    with pytest.raises(ValueError, match="`step` .* known length, .* set `limit_train_batches` .* but got 3"):
        trainer(build(step=3), max_epochs=LENGTH).fit(Toy(), loader, data())
    callback = build(step=3)
    trainer(callback, max_epochs=LENGTH, limit_train_batches=4).fit(Toy(), loader, data())
    assert [found["level"] for found in callback.levels] == [0, 1, 2]


def test_a_step_that_manual_optimization_does_not_come_to_is_told():
    class Rests(GAN):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2 == 0:
                super().training_step(batch, batch_idx)

    callback = build(step=2)
    trainer(callback, max_epochs=LENGTH).fit(Rests(), data())
    assert callback.course.epoch == 0 and callback.levels[-1]["level"] == 2
    with pytest.raises(ValueError, match="`step` is one of the first training's, which took 6, but got 9"):
        trainer(build(step=9), max_epochs=LENGTH).fit(Rests(), data())


def test_a_run_that_stops_early_says_so():
    class Stops(Scheduled):
        def on_train_epoch_end(self):
            self.trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"Training stopped in level 0 of 2: sparsity is 0\.0000"):
        fit(build(), module=Stops)
