"""What is done beside training leaves training, loaders, averages and resumed runs as they are."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_prune import (
    Channel,
    Distillation,
    InitialPruning,
    PerRow,
    PostTrainingPruning,
    TrainTimePruning,
    Wanda,
    Window,
)
from tests.callbacks.test_beside_lightning import Saves
from tests.callbacks.test_user_steps import SkipsFirst
from tests.callbacks.toy import NUM_BATCHES, Toy, data, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`training_step` returned `None`", "ignore:Be aware that when using `ckpt_path`"
)
CHANNELS = {"granularity": Channel(multiple_of=1), "include": ["body"], "report": False}


class Numbers(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        return torch.cat([torch.tensor([float(index)]), torch.randn(7, generator=draw)]), index % 4


class Reads(Toy):
    """Notes the first example of each batch that it is trained on."""

    read = ()

    def training_step(self, batch, batch_idx):
        if torch.is_grad_enabled() and self.training:
            type(self).read += (int(batch[0][0, 0]),)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "pruning", [InitialPruning(0.5, report=False), InitialPruning(0.5, num_rounds=2, **CHANNELS)]
)
def test_persistent_workers_give_training_all_their_batches(pruning, monkeypatch):
    monkeypatch.setattr(Reads, "read", ())
    loader = DataLoader(Numbers(), 8, num_workers=1, persistent_workers=True)
    trainer(pruning, max_epochs=2).fit(Reads(), loader, data())
    assert Reads.read[-2 * NUM_BATCHES :] == 2 * (0, 8, 16, 24, 32, 40)


@pytest.mark.parametrize("shrink", ["end", "update"])
def test_a_run_whose_first_batch_is_skipped_resumes_bit_for_bit(shrink, tmp_path):
    def pruning():
        return TrainTimePruning(0.5, shrink=shrink, window=Window(start=0.3, end=0.7, every=0.1), **CHANNELS)

    path = tmp_path / "middle.ckpt"
    trainer(Saves(path, 2 * NUM_BATCHES), pruning()).fit(whole := SkipsFirst(), data(), data())
    trainer(pruning()).fit(resumed := SkipsFirst(), data(), data(), ckpt_path=path)
    assert len(whole.body[0].weight) < 16
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


def test_a_layer_that_training_never_runs_is_an_error_at_once():
    class Spares(Toy):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(8, 8)

    callback = TrainTimePruning(0.5, criterion=Wanda(), scope=PerRow(), include=["spare"], report=False)
    with pytest.raises(ValueError, match="nothing flowed through Linear.forward"):
        trainer(callback).fit(Spares(), data(), data())


def test_pruning_with_the_trainer_of_an_averaged_fit_saves_what_was_pruned(tmp_path):
    averaging = EMAWeightAveraging(decay=0.5)
    fit = trainer(averaging, default_root_dir=tmp_path, enable_checkpointing=True)
    module = Toy()
    module.train_dataloader = module.val_dataloader = data
    fit.fit(module)
    callback = PostTrainingPruning(0.9, report=False)
    callback.run(fit, module)
    saved = torch.load(callback.path, weights_only=True)["state_dict"]
    for name, mask in callback.masks.items():
        assert not saved[name][~mask].any() and torch.equal(saved[name], module.state_dict()[name])
    assert callback.metrics_after != callback.metrics_before


class BuiltLate(Toy):
    """Has its network from `configure_model`, which asks the trainer."""

    def __init__(self):
        super().__init__()
        self.body = self.head = None

    def configure_model(self):
        assert self.trainer is not None
        if self.body is None:
            other = Toy()
            self.body, self.head = other.body, other.head


@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:Found keys")
def test_a_network_that_is_built_late_is_averaged_and_pruned(tmp_path):
    callback = PostTrainingPruning(0.8, report=False)
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=0.5)
    fit = trainer(averaging, callback, default_root_dir=tmp_path, enable_checkpointing=True)
    fit.fit(module := BuiltLate(), data(), data())
    assert callback.path and float((module.head.weight == 0).float().mean()) > 0.5


def test_a_network_that_is_built_late_is_pruned_from_its_checkpoint(tmp_path):
    fit = trainer(max_epochs=1)
    fit.fit(trained := Toy(), data(), data())
    fit.save_checkpoint(tmp_path / "dense.ckpt")
    module = BuiltLate()
    module.train_dataloader = module.val_dataloader = data
    callback = PostTrainingPruning(0.8, report=False)
    callback.run(trainer(default_root_dir=tmp_path), module, ckpt_path=tmp_path / "dense.ckpt")
    mask = callback.masks["head.weight"]
    assert torch.equal(module.head.weight, trained.head.weight * mask) and not mask.all()


def test_distillation_of_a_network_that_is_built_late_is_resumed_when_it_is_smaller(tmp_path):
    def callbacks():
        return Distillation(), TrainTimePruning(0.5, window=Window(end=0.3), **CHANNELS)

    fit = trainer(*callbacks(), max_epochs=2)
    fit.fit(half := BuiltLate(), data(), data())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    again = callbacks()
    trainer(*again, max_epochs=3).fit(module := BuiltLate(), data(), data(), ckpt_path=tmp_path / "half.ckpt")
    assert len(module.body[0].weight) == len(half.body[0].weight) < 16 == len(again[0].teacher.body[0].weight)


@pytest.mark.parametrize("kind", [Toy, BuiltLate])
def test_the_teacher_of_a_run_that_starts_from_a_trained_model_is_that_model(kind, tmp_path):
    fit = trainer(max_epochs=1)
    fit.fit(trained := Toy(), data(), data())
    fit.save_checkpoint(path := tmp_path / "trained.ckpt")
    callbacks = distilled, _ = Distillation(), TrainTimePruning(0.5, report=False)
    trainer(*callbacks, max_epochs=2).fit(kind(), data(), data(), ckpt_path=path)
    for name, weight in trained.named_parameters():
        assert torch.equal(distilled.teacher.get_parameter(name), weight)


def test_distillation_listens_within_a_module_that_is_compiled_as_a_whole():
    class Notes(Toy):
        heard = False

        def log(self, name, *args, **kwargs):
            type(self).heard |= name == "train/distillation"

    distilled = Distillation()
    trainer(distilled, max_epochs=1).fit(torch.compile(Notes(), backend="eager"), data(), data())
    assert Notes.heard


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(2, 4, (12, 16)), (0, 1, (0, 6)), (1.5, 3, (9, 14)), (0, 6, (0, 20))]
)
def test_windows_in_epochs_begin_with_them_where_accumulation_changes(start, end, steps):
    window = Window(start, end, 0.5, unit="epochs")
    callback = TrainTimePruning(0.5, window=window, report=False)
    accumulating = GradientAccumulationScheduler({0: 1, 2: 3})
    trainer(callback, accumulating, max_epochs=6).fit(Toy(), data(), data())
    assert (callback.ramp.steps.start, callback.ramp.steps.end) == steps and callback.is_final


def test_what_is_saved_before_the_first_batch_of_a_resumed_run_is_what_was_loaded(tmp_path):
    class Looks(L.Callback):
        state = None

        def on_train_epoch_start(self, trainer, pl_module):
            self.state = self.state or callback.state_dict()

    fit = trainer(TrainTimePruning(0.5, window=Window(end=0.5), **CHANNELS), max_epochs=1)
    fit.fit(Toy(), data(), data())
    fit.save_checkpoint(path := tmp_path / "first.ckpt")
    found = torch.load(path, weights_only=True)
    (state,) = (s for key, s in found["callbacks"].items() if key.startswith("TrainTimePruning"))
    state["is_to_shrink"] = True
    del state["checksum"]["is_to_shrink"]
    torch.save(found, path)
    callback, looks = TrainTimePruning(0.5, window=Window(end=0.5), **CHANNELS), Looks()
    trainer(callback, looks, max_epochs=2).fit(Toy(), data(), data(), ckpt_path=path)
    assert looks.state["peak_lr"] == state["peak_lr"] > 0 and looks.state["is_to_shrink"]


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The .grad attribute")
@pytest.mark.parametrize(
    "callback", [TrainTimePruning(0.5, criterion=Wanda(), scope=PerRow(), report=False), Distillation()]
)
def test_scripted_parts_are_left_to_themselves(callback):
    class Scripted(Toy):
        def __init__(self):
            super().__init__()
            self.norm = torch.jit.script(nn.BatchNorm1d(4))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.norm(self(batch[0])), batch[1])

    trainer(callback, max_epochs=1).fit(module := Scripted(), data(), data())
    assert not module.norm.running_mean.isnan().any() and module.global_step == NUM_BATCHES
