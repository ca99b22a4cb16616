"""Pruning beside what else Lightning offers: averages, optimizers that change, longer runs, networks built late."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.nn import functional as F

from lightning_prune import (
    Channel,
    Distillation,
    Linear,
    PostTrainingPruning,
    SparseGPT,
    TrainTimePruning,
    Wanda,
    WeightRewinding,
    Window,
    preview,
)
from tests.callbacks.toy import NUM_BATCHES, Toy, data, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has"
)
COUPLED = {"granularity": Channel(multiple_of=1), "include": ["body"], "report": False}


def zeros(state, names=("body.0.weight", "body.4.weight", "head.weight")):
    weights = [state[name] for name in names]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def fitted(module, *callbacks, ckpt_path=None, **options):
    fit = trainer(*callbacks, **options)
    fit.fit(module, data(), data(), ckpt_path=ckpt_path)
    return fit


class Saves(L.Callback):
    """Saves a checkpoint at the end of a batch, before the callbacks behind it see that end."""

    def __init__(self, path, batch):
        self.path, self.batch, self.num_batches = path, batch, 0

    def on_train_batch_end(self, trainer, *_):
        self.num_batches += 1
        if self.num_batches == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, WeightAveraging])
@pytest.mark.parametrize("options", [{"sparsity": 0.9, "report": False}, {"sparsity": 0.5, **COUPLED}])
def test_what_averages_is_pruned_after_training_too(averaging, options, tmp_path):
    callback = PostTrainingPruning(**options)
    fit = fitted(
        module := Toy(),
        averaging(),
        callback,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    saved = torch.load(callback.path, weights_only=True)["state_dict"]
    fit.save_checkpoint(tmp_path / "later.ckpt")
    later = torch.load(tmp_path / "later.ckpt", weights_only=True)["state_dict"]
    for name, weight in module.state_dict().items():
        assert torch.equal(saved[name], weight) and torch.equal(later[name], weight)
    if "granularity" not in options:
        assert zeros(saved) == pytest.approx(0.9, abs=0.005)
    (plain,) = trainer().validate(module, data(), verbose=False)
    assert callback.metrics_after == pytest.approx(plain)


@pytest.mark.parametrize("shrink", ["end", "update"])
@pytest.mark.parametrize("at", [6, 12])
def test_what_was_to_be_taken_out_when_a_checkpoint_was_saved_is_taken_out_by_the_resumed_run(
    shrink, at, tmp_path
):
    window = Window(start=0, end=12, every=6, unit="steps")
    options = {"sparsity": 0.5, "shrink": shrink, "window": window, **COUPLED}
    path = tmp_path / "between.ckpt"
    fitted(whole := Toy(), Saves(path, at), TrainTimePruning(**options))
    fitted(resumed := Toy(), TrainTimePruning(**options), ckpt_path=path)
    assert len(whole.body[0].weight) < 16
    expected = whole.state_dict()
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_nothing_is_left_to_take_out_of_a_run_that_was_saved_at_its_last_step(tmp_path):
    options = {"sparsity": 0.5, "window": Window(end=1.0), **COUPLED}
    path = tmp_path / "last.ckpt"
    fitted(whole := Toy(), Saves(path, 4 * NUM_BATCHES), TrainTimePruning(**options))
    fitted(resumed := Toy(), TrainTimePruning(**options), ckpt_path=path)
    assert resumed.body[0].weight.shape == whole.body[0].weight.shape != (16, 8)


def test_a_checkpoint_pruned_after_training_is_trained_on_with_its_optimizer(tmp_path):
    callback = PostTrainingPruning(sparsity=0.5, **COUPLED)
    fitted(module := Toy(), callback, default_root_dir=tmp_path, enable_checkpointing=True)
    states = torch.load(callback.path, weights_only=True)["optimizer_states"][0]["state"]
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    assert [tuple(state["exp_avg"].shape) for state in states.values()] == shapes
    longer = PostTrainingPruning(sparsity=0.5, **COUPLED)
    fit = fitted(on := Toy(), longer, ckpt_path=callback.path, max_epochs=5, default_root_dir=tmp_path)
    assert fit.global_step == 5 * NUM_BATCHES
    assert len(on.body[0].weight) < 16


@pytest.mark.parametrize("again", ["resumed", "same callback"])
def test_a_ramp_that_is_over_stays_over_in_a_longer_run(again, tmp_path):
    fit = fitted(module := Toy(), callback := TrainTimePruning(0.9, report=False))
    fit.save_checkpoint(tmp_path / "over.ckpt")
    if again == "resumed":
        path, module, callback = tmp_path / "over.ckpt", Toy(), TrainTimePruning(0.9, report=False)
        fitted(module, callback, ckpt_path=path, max_epochs=20)
    else:
        before = len(callback.updates)
        fitted(module, callback, max_epochs=20)
        assert len(callback.updates) == before
    assert {update["step"] <= 4 * NUM_BATCHES for update in callback.updates} == {True}
    assert zeros(module.state_dict()) == pytest.approx(0.9, abs=0.005) and callback.is_final


def test_a_higher_target_is_ramped_up_to_in_a_longer_run(tmp_path):
    fit = fitted(Toy(), TrainTimePruning(0.5, report=False))
    fit.save_checkpoint(tmp_path / "over.ckpt")
    with pytest.warns(UserWarning, match="`sparsity` was 0.5 in the run that is resumed, and is 0.9"):
        fitted(
            module := Toy(),
            TrainTimePruning(0.9, report=False),
            ckpt_path=tmp_path / "over.ckpt",
            max_epochs=20,
        )
    assert zeros(module.state_dict()) == pytest.approx(0.9, abs=0.005)


class Divided(Toy):
    """Two optimizers by hand; weights of the first join the second in the middle of training."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            second = self.optimizers()[1].optimizer
            second.add_param_group({"params": [self.body[0].weight]})

    def configure_optimizers(self):
        weights = [self.body[0].weight, self.body[4].weight]
        others = [p for p in self.parameters() if all(p is not w for w in weights)]
        return [torch.optim.SGD([weights[1]], 0.1), torch.optim.SGD([p for p in others if p.dim() == 1], 0.1)]


class Watches(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        self.seen.append(zeros(module.state_dict(), ("body.0.weight", "body.4.weight")))


def test_masks_hold_for_weights_that_join_another_optimizer():
    callback = TrainTimePruning(0.9, include=["body"], window=Window(end=0.5), report=False)
    fitted(Divided(), callback, watches := Watches(), max_epochs=6)
    assert watches.seen[-NUM_BATCHES:] == pytest.approx([0.9] * NUM_BATCHES, abs=0.005)


@pytest.mark.parametrize("window", [Window(end=1.0), Window(end=4, every=0.5, unit="epochs")])
@pytest.mark.parametrize("accumulation", [{0: 4}, {0: 1, 2: 3}])
def test_accumulation_that_is_scheduled_counts(accumulation, window):
    callback = TrainTimePruning(0.9, schedule=Linear(), window=window, report=False)
    scheduler = GradientAccumulationScheduler(accumulation)
    expected = preview(callback, Toy(), data(), trainer(scheduler))
    fit = fitted(module := Toy(), scheduler, callback)
    assert callback.ramp.num_steps == callback.ramp.steps.end == fit.global_step and not callback.warnings
    assert [update["step"] for update in callback.updates] == [update.step for update in expected.updates]
    assert zeros(module.state_dict()) == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
@pytest.mark.parametrize("kind", [TrainTimePruning, PostTrainingPruning])
def test_processes_of_which_no_smaller_model_comes_back_are_refused(strategy, kind):
    fit = trainer(callback := kind(sparsity=0.5, **COUPLED), strategy=strategy, devices=2)
    with pytest.raises(ValueError, match="weights of the same shapes alone come back"):
        callback.setup(fit, Toy(), "fit")


class Late(Toy):
    """Builds its network when asked to, in one of the two places that Lightning has for that."""

    place = "configure_model"

    def __init__(self):
        super().__init__()
        self.built, self.body, self.head = (self.body, self.head), None, None
        self.__dict__["built"] = self.built

    def build(self):
        if self.body is None:
            self.body, self.head = self.__dict__["built"]

    def configure_model(self):
        if self.place == "configure_model":
            self.build()

    def setup(self, stage):
        if self.place == "setup":
            self.build()


class BuiltInSetup(Late):
    place = "setup"


@pytest.mark.parametrize("kind", [Late, BuiltInSetup])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_teacher_is_copied_of_a_network_that_is_built_late(kind, from_file, tmp_path):
    early = Toy()
    fitted(early, max_epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    teacher = tmp_path / "dense.ckpt" if from_file else None
    distillation = Distillation(0.5, teacher=teacher, output="head")
    fitted(module := kind(), distillation, TrainTimePruning(0.9, report=False))
    expected = early if from_file else Toy()
    for name, weight in expected.named_parameters():
        assert torch.equal(distillation.teacher.get_parameter(name), weight)
    assert zeros(module.state_dict()) == pytest.approx(0.9, abs=0.005)


def test_a_network_of_configure_model_is_pruned_without_training(tmp_path):
    callback = PostTrainingPruning(0.9, report=False)
    callback.run(trainer(default_root_dir=tmp_path), module := Late(), Data())
    assert zeros(module.state_dict()) == pytest.approx(0.9, abs=0.005)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return data()


class Partial(Toy):
    """Leaves a frozen part out of its checkpoints, as Lightning's documentation shows."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.strict_loading = False

    def forward(self, x):
        return self.frozen(super().forward(x))

    def state_dict(self, *args, **kwargs):
        found = super().state_dict(*args, **kwargs)
        return {name: weight for name, weight in found.items() if "frozen" not in name}


def test_weights_that_are_not_in_checkpoints_stay(tmp_path):
    rewinding = WeightRewinding(0.9, num_levels=2, report=False, exclude=["frozen"])
    fitted(module := Partial(), rewinding, max_epochs=2)
    assert zeros(module.state_dict()) == pytest.approx(0.9, abs=0.01)
    callback = PostTrainingPruning(0.9, checkpoint="best", report=False, exclude=["frozen"])
    best = L.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="val/loss")
    module = Partial()
    fitted(module, best, EMAWeightAveraging(), callback, enable_checkpointing=True, default_root_dir=tmp_path)
    assert zeros(module.state_dict()) == pytest.approx(0.9, abs=0.01)


def test_rewinding_says_what_it_cannot_go_back_from():
    with pytest.raises(
        ValueError, match="go back with the learning rates, but got StochasticWeightAveraging"
    ):
        fitted(Toy(), StochasticWeightAveraging(1e-2), WeightRewinding(0.9, num_levels=2, report=False))

    class Backbone(Toy):
        def __init__(self):
            super().__init__()
            self.backbone, self.body = self.body, nn.Identity()

        def forward(self, x):
            return self.head(self.backbone(x))

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.1)

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    rewinding = WeightRewinding(0.9, num_levels=1, report=False, include=["head"])
    with pytest.raises(ValueError, match="groups of parameters that they had when the snapshot was taken"):
        fitted(Backbone(), finetuning, rewinding, max_epochs=3)


def test_a_training_step_of_the_instance_comes_back():
    module = Toy()
    step = module.training_step
    module.training_step = own = lambda batch, batch_idx: step(batch, batch_idx)
    fitted(module, Distillation(0.5), max_epochs=1)
    assert module.training_step is own


@pytest.mark.parametrize(
    "callback",
    [
        lambda: TrainTimePruning(0.5, criterion=Wanda(), window=Window(start=0.3), report=False),
        lambda: PostTrainingPruning(0.5, criterion=Wanda(), report=False),
        lambda: PostTrainingPruning(0.5, solver=SparseGPT(), report=False),
    ],
)
def test_activations_of_compiled_modules_are_seen(callback):
    module = Toy()
    module.body = torch.compile(module.body, backend="eager")
    fitted(module, callback())
    weights = [p for p in module.parameters() if p.dim() > 1]
    share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert share == pytest.approx(0.5, abs=0.02)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_lengths_and_directions_of_weights_are_no_weights():
    module = Toy()
    nn.utils.weight_norm(module.body[0])
    callback = PostTrainingPruning(0.9, report=False)
    with pytest.warns(UserWarning, match=r"`body\.0` is not pruned"):
        fitted(module, callback)
    assert list(callback.pruner.targets) == ["body.4.weight", "head.weight"]
    assert bool((module.body[0].weight_g != 0).all()) and bool(module.body[0].weight_v.ne(0).any(1).all())


class ByHand(L.Callback):
    """Keeps an exponential average of the weights since the start of the present level, as they are after each step."""

    def __init__(self, rewinding, decay):
        self.rewinding, self.decay, self.level, self.average = rewinding, decay, 0, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}
        if self.average is None or self.rewinding.level != self.level:
            self.level, self.average = self.rewinding.level, now
        self.average = {n: w.lerp(now[n], 1.0 - self.decay) for n, w in self.average.items()}


@pytest.mark.parametrize("rewind", ["weights", "learning_rate"])
def test_an_average_is_of_the_level_alone_in_which_it_is_taken(rewind):
    rewinding = WeightRewinding(0.9, num_levels=2, rewind=rewind, report=False)
    by_hand = ByHand(rewinding, decay=0.8)
    fitted(module := Toy(), EMAWeightAveraging(decay=0.8), by_hand, rewinding, max_epochs=1)
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.detach(), by_hand.average[name])
    assert zeros(module.state_dict()) == pytest.approx(0.9, abs=0.005)


class BuiltInSetup(Toy):
    """Has no network before the trainer calls `setup`."""

    def __init__(self, is_anew: bool = False):
        super().__init__()
        self.is_anew = is_anew
        del self.body, self.head

    def setup(self, stage):
        if self.is_anew or not hasattr(self, "head"):
            built = Toy()
            self.body, self.head = built.body, built.head


@pytest.mark.parametrize("options", [{"sparsity": 0.9, "report": False}, {"sparsity": 0.5, **COUPLED}])
def test_a_network_that_setup_builds_is_pruned_from_its_checkpoint(options, tmp_path):
    path = tmp_path / "dense.ckpt"
    fitted(trained := Toy()).save_checkpoint(path)
    callback, module = PostTrainingPruning(**options), BuiltInSetup()
    module.train_dataloader = module.val_dataloader = data
    callback.run(trainer(default_root_dir=tmp_path), module, ckpt_path=path)
    if "granularity" in options:
        assert len(module.body[0].weight) < 16
    else:
        kept = callback.masks["body.0.weight"]
        assert torch.equal(module.body[0].weight, trained.body[0].weight * kept) and not kept.all()


def test_a_network_that_setup_builds_anew_each_time_is_refused(tmp_path):
    module = BuiltInSetup(is_anew=True)
    module.train_dataloader = module.val_dataloader = data
    with pytest.raises(ValueError, match="`setup` of BuiltInSetup builds what is not there yet"):
        PostTrainingPruning(0.9, report=False).run(trainer(default_root_dir=tmp_path), module)
    assert not list(tmp_path.rglob("pruned.ckpt"))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("kind", [TrainTimePruning, PostTrainingPruning])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_layer_whose_weight_is_computed_is_named_where_it_is_left_out(norm, kind):
    module = Toy()
    module.head = norm(module.head)
    with pytest.warns(UserWarning, match="`head` is not pruned: its weight is computed"):
        fitted(module, callback := kind(0.5, report=False))
    assert len(callback.warnings) == 1 and sorted(callback.masks) == ["body.0.weight", "body.4.weight"]
    for other, options in [(Toy(), {}), (Toy(), {"include": ["body"]}), (Toy(), {"exclude": ["head"]})]:
        other.head = norm(other.head) if options else other.head
        fitted(other, asked := kind(0.5, report=False, **options))
        assert not asked.warnings
