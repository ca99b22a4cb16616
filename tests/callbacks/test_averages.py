"""Modules that hold averages of their own weights: these become smaller with them, bit for bit as if cut by hand."""

import copy
from contextlib import nullcontext
from itertools import product
from operator import attrgetter
from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel

from lightning_prune import (
    Budget,
    Channel,
    Constant,
    InitialPruning,
    PostTrainingPruning,
    TrainTimePruning,
    Window,
    load_pruned,
)
from lightning_prune.callbacks.structure import example_call
from lightning_prune.model.history import plans_of
from lightning_prune.model.surgery import execute_
from tests.callbacks.toy import Toy, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
COUPLED = {"granularity": Channel(multiple_of=1), "report": False}


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4))


class Net(Toy):
    """A network, and what else `also` gives it; averages are taken within a step or, as most do it, after it."""

    def __init__(self, seed=0, within=False):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head, self.within = net(), nn.Identity(), within
        self.also()

    def also(self):
        pass

    def average_(self):
        pass

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.within:
            with torch.no_grad():
                self.average_()

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        if not self.within:
            self.average_()

    def with_data(self):
        self.train_dataloader = self.val_dataloader = data
        return self


class Deepcopy(Net):
    """Updated by `lerp_`, past autograd's count of writes."""

    def also(self):
        self.ema = copy.deepcopy(self.body).requires_grad_(False)

    def average_(self):
        for average, own in zip(self.ema.parameters(), self.body.parameters(), strict=True):
            average.data.lerp_(own.data, 0.1)
        for average, own in zip(self.ema.buffers(), self.body.buffers(), strict=True):
            average.copy_(own)


class Averaged(Net):
    """By torch; its parameters ask for gradients and are in the optimizer, but get none."""

    def also(self):
        self.average = AveragedModel(self.body)

    def average_(self):
        self.average.update_parameters(self.body)


class MeanTeacher(Deepcopy):
    """The average runs in the training step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            told = self.ema(batch[0])
        return loss + F.mse_loss(self(batch[0]), told)


class Parts(Net):
    """Averages of two parts of the network, one of them a single layer."""

    def also(self):
        self.first, self.last = copy.deepcopy(self.body[:2]), copy.deepcopy(self.body[4])
        self.first.requires_grad_(False), self.last.requires_grad_(False)

    def average_(self):
        for average, own in (
            (self.first[0], self.body[0]),
            (self.first[1], self.body[1]),
            (self.last, self.body[4]),
        ):
            for a, b in zip(average.parameters(), own.parameters(), strict=True):
                a.lerp_(b, 0.1)


HOLDING = [Deepcopy, Averaged, MeanTeacher, Parts]


def build(shrink="end", **own):
    return TrainTimePruning(0.5, **COUPLED, shrink=shrink, window=Window(every=0.1, end=0.6), **own)


def run(module, callback, folder=None, **options):
    saving = (
        [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if folder else []
    )
    torch.manual_seed(7)
    fit = trainer(callback, *saving)
    fit.fit(module, data(shuffle=True), data(), weights_only=True, **options)
    return module


def hidden(module, paths):
    """Take averages out of a module's submodules, though it goes on to use them."""
    for name in dict.fromkeys(path.partition(".")[0] for path in paths):
        vars(module)[name] = module._modules.pop(name)
    return module


class ByHand(TrainTimePruning):
    """Slices averages that are hidden as what they are averages of."""

    pairs: ClassVar[dict[str, str]] = {}

    def _shrink_(self, trainer, module, *args):
        num = len(plans_of(module))
        super()._shrink_(trainer, module, *args)
        for plan, (path, original) in product(plans_of(module)[num:], self.pairs.items()):
            average = attrgetter(path)(module)
            found = {**dict(average.named_parameters()), **dict(average.named_buffers())}
            for name, tensor in found.items():
                for dim, kept in plan.slices.get(f"{original}.{name}", {}).items():
                    tensor.data = tensor.data.index_select(dim, torch.tensor(kept))


PAIRS = {
    Deepcopy: {"ema": "body"},
    Averaged: {"average.module": "body"},
    MeanTeacher: {"ema": "body"},
    Parts: {"first.0": "body.0", "first.1": "body.1", "last": "body.4"},
}


@pytest.mark.parametrize("shrink", ["end", "update"])
@pytest.mark.parametrize("kind", HOLDING)
def test_averages_are_cut_as_by_hand(kind, shrink):
    module = run(kind(), build(shrink))
    hand = ByHand(0.5, **COUPLED, shrink=shrink, window=Window(every=0.1, end=0.6))
    hand.pairs = PAIRS[kind]
    expected = run(hidden(kind(), PAIRS[kind]), hand)
    assert len(plans_of(module)) > (shrink == "update")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    for path in PAIRS[kind]:
        for name, tensor in attrgetter(path)(expected).state_dict().items():
            assert torch.equal(module.get_submodule(path).state_dict()[name], tensor), (path, name)
    if kind is not Parts:
        x = torch.randn(3, 8)
        (path,) = PAIRS[kind]
        assert module.get_submodule(path).eval()(x).shape == (3, 4)


@pytest.mark.parametrize("shrink", ["end", "update"])
@pytest.mark.parametrize("kind", HOLDING)
def test_a_resumed_run_goes_on_bit_for_bit_and_can_be_loaded(kind, shrink, tmp_path):
    """Also right before the model becomes smaller, and right after that."""
    expected = run(kind(within=True), build(shrink), tmp_path).state_dict()
    for step in (1, 13, 14, 15, 23):
        found = run(
            kind(1, within=True), build(shrink), ckpt_path=tmp_path / f"step={step}.ckpt"
        ).state_dict()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    loaded = load_pruned(kind, tmp_path / "step=24.ckpt").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("step", [1, 13, 14, 15])
def test_a_run_is_resumed_whose_averages_are_taken_after_the_step(step, tmp_path):
    """Lightning saves before the module's hook, so that an update is missing, but nothing else."""
    expected = run(MeanTeacher(), build(), tmp_path)
    found = run(MeanTeacher(1), build(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert plans_of(found) and found.ema[0].out_features == found.body[0].out_features
    assert len(plans_of(found)) == len(plans_of(expected))


class Fixed(Net):
    """A teacher that stays as it is, of the same weights at first or of others."""

    is_equal = True

    def also(self):
        self.teacher = (copy.deepcopy(self.body) if self.is_equal else net()).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), self.teacher(batch[0]))


class OtherFixed(Fixed):
    is_equal = False


class Twins(Net):
    """Two networks of one structure that are trained, and that a step calls one after the other."""

    def also(self):
        self.other = net()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.cross_entropy(self.other(batch[0]), batch[1])


def test_a_copy_that_does_not_change_stays_whole_and_that_is_said():
    module, callback = Fixed(), build()
    before = copy.deepcopy(module.teacher)
    with pytest.warns(UserWarning, match="`teacher` stays whole: a copy of body that has not changed"):
        run(module, callback)
    assert module.body[0].out_features == 8 or module.body[3].out_features < 8
    for name, tensor in before.named_parameters():
        assert torch.equal(module.teacher.get_parameter(name), tensor)


def test_a_teacher_of_the_structure_stays_whole():
    module = run(OtherFixed(), build())
    assert num(module.body) < num(module.teacher)


class TargetOfOne(Twins):
    """An average of the second twin."""

    def also(self):
        super().also()
        self.target = copy.deepcopy(self.other).requires_grad_(False)

    def average_(self):
        for average, own in zip(self.target.parameters(), self.other.parameters(), strict=True):
            average.lerp_(own, 0.1)


class InForward(Deepcopy):
    """The average runs with the model."""

    def forward(self, x):
        return self.body(x) + 0.1 * self.ema(x).detach()


def test_an_average_follows_the_one_of_two_networks_that_it_is_of():
    module = run(TargetOfOne(), build())
    (plan,) = plans_of(module)
    assert shapes(module.target) == shapes(module.other) != shapes(net())
    assert num(module.body) < num(net())
    ways = [
        {n: dims for n, dims in plan.slices.items() if n.startswith(path)} for path in ("target", "other")
    ]
    assert ways[0] == {n.replace("other", "target", 1): dims for n, dims in ways[1].items()} != {}
    assert any(plan.slices.get(n.replace("target", "body", 1)) != dims for n, dims in ways[0].items())


def test_what_cannot_follow_is_refused_after_the_first_step():
    module = InForward()
    fit = trainer(build())
    with pytest.raises(ValueError, match=r"`ema` is built as .* Average by torch's AveragedModel"):
        fit.fit(module, data(), data())
    assert fit.global_step == 1 and not plans_of(module)


AT_ONCE = pytest.mark.parametrize(
    "make",
    [
        lambda **own: InitialPruning(0.5, **COUPLED, **own),
        lambda **own: TrainTimePruning(0.5, **COUPLED, schedule=Constant(), window=Window(end=0.0), **own),
    ],
    ids=["initial", "train_time"],
)


@AT_ONCE
@pytest.mark.parametrize("kind", [MeanTeacher, Deepcopy])
def test_copies_of_a_model_that_is_smaller_before_they_show_what_they_are_are_refused(kind, make):
    module = kind()
    with pytest.raises(
        ValueError, match="`ema` has the values of `body`, or nearly, which becomes smaller before"
    ):
        trainer(make()).fit(module, data(), data())
    assert not plans_of(module) and module.ema[0].out_features == module.body[0].out_features == 16


@AT_ONCE
def test_torchs_average_is_certain_before_the_first_step(make):
    module = Averaged()
    module.average.requires_grad_(False)
    trainer(make()).fit(module, data(), data())
    assert plans_of(module) and shapes(module.average.module) == shapes(module.body)


def test_a_plan_that_is_mirrored_is_replayed_on_a_fresh_model(tmp_path):
    module = run(Averaged(), build())
    fresh = Averaged()
    for plan in plans_of(module):
        execute_(fresh, plan)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in module.parameters()]


class Delayed(Deepcopy):
    """Averages from some step on, which no step before tells."""

    def average_(self):
        if self.trainer.global_step > 30:
            super().average_()


@pytest.mark.parametrize(
    "make", [build, lambda: build("update"), lambda: PostTrainingPruning(0.5, **COUPLED)]
)
def test_a_copy_that_no_step_runs_becomes_smaller_and_that_is_said(make):
    module = Delayed()
    with pytest.warns(
        UserWarning, match="`ema` becomes smaller with `body`, whose .* no step so far has run it"
    ):
        trainer(make()).fit(module, data(), data())
    assert plans_of(module) and shapes(module.ema) == shapes(module.body)


class Taught(Net):
    """A teacher that a step runs in training only, from some epoch on, or in validation alone."""

    how = "training"

    def also(self):
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        runs = {"training": self.training, "later": self.current_epoch > 0, "validation": False}[self.how]
        loss = super().training_step(batch, batch_idx)
        return loss + F.mse_loss(self(batch[0]), self.teacher(batch[0])) if runs else loss

    def validation_step(self, batch, batch_idx):
        self.log("agreement", F.mse_loss(self(batch[0]), self.teacher(batch[0])))


@pytest.mark.parametrize("how", ["training", "later", "validation"])
@pytest.mark.parametrize("make", [build, lambda: PostTrainingPruning(0.5, **COUPLED)], ids=["train", "post"])
def test_a_teacher_stays_whole_whenever_it_runs(make, how, monkeypatch):
    monkeypatch.setattr(Taught, "how", how)
    module = Taught()
    with pytest.warns(UserWarning, match="`teacher` stays whole"):
        trainer(make()).fit(module, data(), data())
    assert plans_of(module) and shapes(module.teacher) == shapes(net())
    assert not any(part._forward_pre_hooks for part in module.teacher.modules())


class RawTwins(Net):
    """Two networks of their own optimizers, which are stepped past Lightning."""

    def also(self):
        self.other, self.automatic_optimization = net(), False

    def training_step(self, batch, batch_idx):
        for part, optimizer in zip(
            (self.body, self.other), self.optimizers(use_pl_optimizer=False), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(part(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.body, self.other)]


class Beside(Net):
    """A frozen copy that is added to what is trained from it: both are cut alike, or none."""

    def also(self):
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.locked, self.control = nn.Linear(8, 16), nn.Linear(8, 16)
        self.locked.load_state_dict(self.control.state_dict())
        self.locked.requires_grad_(False)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.body(x) + self.last((self.locked(x) + self.control(x)).relu())


@pytest.mark.parametrize("make", [build, lambda: PostTrainingPruning(0.5, **COUPLED)], ids=["train", "post"])
def test_what_is_trained_past_lightning_is_no_average(make):
    module = RawTwins()
    trainer(make()).fit(module, data(), data())
    assert plans_of(module) and shapes(module.other) == shapes(net()) != shapes(module.body)


@pytest.mark.parametrize("shrink", ["end", "update"])
@pytest.mark.parametrize("include", [None, ["body", "locked", "control"]])
def test_masks_are_no_change_that_tells_of_an_average(shrink, include):
    module = run(Beside(), build(shrink, include=include))
    assert module.locked.out_features == module.control.out_features
    assert (module.locked.out_features < 16) is (
        include is not None
    )  # what is frozen stays, unless it is named


class Normed(Deepcopy):
    """The average is built as its network is, and not copied from it."""

    def also(self):
        def normed():
            return nn.Sequential(
                nn.Linear(8, 16), nn.ReLU(), spectral_norm(nn.Linear(16, 8)), nn.Linear(8, 4)
            )

        self.body, self.ema = normed(), normed().requires_grad_(False)
        self.ema.load_state_dict(self.body.state_dict())


def test_parametrized_averages_follow_as_wholes():
    module = run(Normed(), build("update"))
    assert shapes(module.ema) == shapes(module.body) and len(plans_of(module)) > 1


def test_a_second_fit_of_another_module_is_watched_anew():
    callback = PostTrainingPruning(0.5, **COUPLED)
    for module in (MeanTeacher(), MeanTeacher(seed=1)):
        trainer(callback).fit(module, data(), data())
        assert shapes(module.ema) == shapes(module.body) != shapes(net())


@AT_ONCE
def test_a_teacher_that_is_excluded_stays_and_nothing_is_said(make):
    module = Fixed()
    before = copy.deepcopy(module.teacher)
    trainer(make(exclude=["teacher"])).fit(module, data(), data())
    assert plans_of(module) and shapes(module.teacher) == shapes(before)


class Target(Deepcopy):
    """A target network, which each step reads, and which is replaced every so many steps."""

    every = 9

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            told = self.ema(batch[0])
        return loss + 0.1 * F.mse_loss(self(batch[0]), told)

    def average_(self):
        step = self.trainer.global_step
        if step and step % self.every == 0:
            self.ema.load_state_dict(self.body.state_dict())


class Sizes(L.Callback):
    """Notes the step after which the model has become smaller for the first time."""

    first = None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.first is None and plans_of(pl_module):
            self.first = trainer.global_step


def shapes(module):
    return [tuple(p.shape) for p in module.parameters()]


@pytest.mark.parametrize("within", [False, True])
def test_a_model_waits_for_a_target_network_that_is_not_replaced_yet(within):
    module, sizes = Target(within=within), Sizes()
    with pytest.warns(
        UserWarning, match="`ema` has the values of `body`, or nearly, and has not changed yet"
    ):
        trainer(build("update"), sizes).fit(module, data(), data())
    assert Target.every <= sizes.first < 14
    assert shapes(module.ema) == shapes(module.body) != shapes(net())


@pytest.mark.filterwarnings("ignore:.* has not changed yet")
def test_a_run_that_waits_is_resumed_bit_for_bit(tmp_path):
    expected = run(Target(within=True), build("update"), tmp_path).state_dict()
    for step in (3, 8, 9, 10, 14):
        found = run(Target(1, within=True), build("update"), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.items()), step


def test_a_model_waits_for_no_teacher_that_is_excluded():
    module, sizes = Fixed(), Sizes()
    trainer(build("update", exclude=["teacher"]), sizes).fit(module, data(), data())
    assert sizes.first < Target.every and shapes(module.teacher) == shapes(net()) != shapes(module.body)


def num(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shrink", ["end", "update"])
@pytest.mark.parametrize("kind", [Deepcopy, Averaged, MeanTeacher])
def test_a_budget_is_met_by_model_and_average(kind, shrink):
    """It could not be if averages were counted as parts that stay."""
    callback = TrainTimePruning(
        budget=Budget(params=0.4), **COUPLED, shrink=shrink, window=Window(every=0.1, end=0.6)
    )
    module = run(kind(), callback)
    assert num(module) / num(kind()) == pytest.approx(0.4, abs=0.02)
    assert callback.pruner.missed is None and not callback.warnings


@pytest.mark.parametrize("own", [{"exclude": ["teacher"]}, {}], ids=["excluded", "found"])
def test_a_budget_counts_teachers_as_they_are(own):
    callback = TrainTimePruning(
        budget=Budget(params=0.75), **COUPLED, window=Window(every=0.1, end=0.6), **own
    )
    module = Fixed()
    with nullcontext() if own else pytest.warns(UserWarning, match="`teacher` stays whole"):
        run(module, callback)
    assert num(module) / num(Fixed()) == pytest.approx(0.75, abs=0.02)
    assert shapes(module.teacher) == shapes(net())


def test_a_budget_that_is_out_of_reach_beside_a_teacher_is_refused():
    callback = TrainTimePruning(budget=Budget(params=0.4), **COUPLED, exclude=["teacher"])
    fit = trainer(callback)
    with pytest.raises(ValueError, match=r"params=0.4 is out of reach .* params=0\.5"):
        fit.fit(Fixed(), data(), data())
    assert fit.global_step == 0


def after(**own):
    return PostTrainingPruning(0.5, **COUPLED, **own)


@pytest.mark.parametrize("kind", HOLDING)
def test_after_training_averages_are_cut_as_what_they_follow(kind):
    module = run(kind(), after())
    (plan,) = plans_of(module)
    dense = run(kind(), L.Callback())
    for path, original in PAIRS[kind].items():
        for name, tensor in dense.get_submodule(path).named_parameters():
            for dim, kept in plan.slices.get(f"{original}.{name}", {}).items():
                tensor.data = tensor.data.index_select(dim, torch.tensor(kept))
            assert torch.equal(module.get_submodule(path).get_parameter(name), tensor), (path, name)
    assert num(module) < num(kind())


@pytest.mark.parametrize(("kind", "path"), [(Fixed, "teacher"), (MeanTeacher, "ema"), (Deepcopy, "ema")])
def test_without_training_what_may_be_a_teacher_stays_and_that_is_said(kind, path, tmp_path):
    module = kind()
    with pytest.warns(UserWarning, match=f"`{path}` stays whole: it may be an average of body, or a teacher"):
        after().run(trainer(default_root_dir=tmp_path), module.with_data())
    assert shapes(module.get_submodule(path)) == shapes(net()) != shapes(module.body)


def test_without_training_torchs_average_is_cut(tmp_path):
    module = Averaged()
    after().run(trainer(default_root_dir=tmp_path), module.with_data())
    assert shapes(module.average.module) == shapes(module.body) != shapes(net())
    module.average_()


def test_of_manual_optimization_it_is_not_known_what_a_step_runs():
    """Only the step of validation was seen."""
    module, fit = MeanTeacher().with_data(), trainer()
    batch = next(iter(data()))
    module._trainer = fit
    seen = example_call(fit, module, [batch])[0].ran
    assert seen is not None and not seen.isdisjoint(module.ema.modules())
    module.automatic_optimization = False
    assert example_call(fit, module, [batch])[0].ran is None
