"""Distillation: the loss is the published one, the teacher stays as it was, and nothing of it is left behind."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import Channel, Distillation, TrainTimePruning, Window
from lightning_prune.model.distillation import distillation_loss
from tests.callbacks.test_resume import DyingCheckpoint, assert_equal, everything, in_a_process_that_dies
from tests.callbacks.toy import GAN, Toy, data, trainer


class Logged(Toy):
    """Keeps the losses that are backpropagated, and the batches."""

    def __init__(self):
        super().__init__()
        self.losses, self.batches = [], []

    def on_before_backward(self, loss):
        self.losses.append(float(loss.detach()))

    def on_train_batch_start(self, batch, batch_idx):
        self.batches.append((batch, copy.deepcopy(self.state_dict())))


class Plain(Logged):
    """Without dropout and batch norm, so that a step can be computed again."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(self.body[0], nn.ReLU(), self.body[4], nn.ReLU())


def pruning(**options):
    return TrainTimePruning(**{"sparsity": 0.5, "window": Window(every=0.1), "report": False, **options})


def fit(*callbacks, module=Logged, ckpt_path=None, **options):
    trained = module()
    torch.manual_seed(7)
    fitted = trainer(*callbacks, **options)
    fitted.fit(trained, data(shuffle=True), data(), ckpt_path=ckpt_path)
    return fitted, trained


def test_the_divergence_is_that_of_the_paper():
    logits, goals = torch.randn(5, 7), torch.randn(5, 7)
    p = np.exp(goals.numpy() / 3) / np.exp(goals.numpy() / 3).sum(1, keepdims=True)
    q = np.exp(logits.numpy() / 3) / np.exp(logits.numpy() / 3).sum(1, keepdims=True)
    expected = 9 * (p * np.log(p / q)).sum(1).mean()
    assert float(distillation_loss(logits, goals, 3.0)) == pytest.approx(expected, rel=1e-5)
    moved = distillation_loss(logits.t()[None], goals.t()[None], 3.0, class_dim=1)
    assert float(moved) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("output", [None, ""], ids=["found", "given"])
def test_the_loss_is_the_mixture_of_labels_and_teacher(output):
    callback = Distillation(weight=0.25, temperature=2.0, output=output)
    _, trained = fit(callback, module=Plain)
    teacher = Plain()
    for loss, ((x, y), state) in zip(trained.losses, trained.batches, strict=True):
        student = Plain()
        student.load_state_dict(state)
        labels = F.cross_entropy(student(x), y)
        expected = 0.75 * labels + 0.25 * distillation_loss(student(x), teacher(x), 2.0)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert all(
        torch.equal(a, b) for a, b in zip(callback.teacher.parameters(), teacher.parameters(), strict=True)
    )


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_the_teacher_computes_in_the_precision_of_the_module(precision, dtype, is_file, tmp_path):
    fit = trainer(precision=precision, max_epochs=1)
    fit.fit(Toy(), data(), data())
    fit.save_checkpoint(tmp_path / "dense.ckpt")
    teaching = Distillation(teacher=tmp_path / "dense.ckpt") if is_file else Distillation()
    trainer(teaching, pruning(), precision=precision).fit(module := Toy(), data(), data())
    assert (
        {p.dtype for p in teaching.teacher.parameters()} == {dtype} == {p.dtype for p in module.parameters()}
    )


def test_features_are_compared_as_well():
    callback = Distillation(weight=0.0, features=["body.0", "body.2"], feature_weight=3.0)
    _, trained = fit(callback, module=Plain)
    teacher, student = Plain(), Plain()
    (x, y), state = trained.batches[-1]
    student.load_state_dict(state)
    first = F.mse_loss(student.body[0](x), teacher.body[0](x))
    second = F.mse_loss(student.body[:3](x), teacher.body[:3](x))
    expected = F.cross_entropy(student(x), y) + 3.0 * (first + second) / 2
    assert trained.losses[-1] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_weight_of_zero_changes_nothing_and_nothing_is_left_behind():
    callback = Distillation(weight=0.0)
    fitted, trained = fit(callback, pruning())
    reference, alone = fit(pruning())
    assert all(
        torch.equal(a, b)
        for a, b in zip(trained.state_dict().values(), alone.state_dict().values(), strict=True)
    )
    assert "training_step" not in vars(trained) and trained.state_dict().keys() == Toy().state_dict().keys()
    assert not any(p.requires_grad for p in callback.teacher.parameters()) and not callback.teacher.training
    assert len(fitted.optimizers[0].param_groups[0]["params"]) == len(
        reference.optimizers[0].param_groups[0]["params"]
    )


def test_the_teacher_stays_dense_when_the_student_is_pruned_before_the_first_step(tmp_path):
    one_shot = pruning(window=Window(end=0.0))
    callback = Distillation()
    _, trained = fit(callback, one_shot)
    assert all(
        (weight != 0).all()
        for name, weight in callback.teacher.state_dict().items()
        if name in one_shot.masks
    )
    assert any((weight == 0).any() for name, weight in trained.state_dict().items() if name in one_shot.masks)


def test_a_model_that_becomes_smaller_goes_on_learning_from_the_whole_one():
    callback = Distillation()
    _, trained = fit(callback, pruning(granularity=Channel(multiple_of=1), shrink="end"))
    assert trained.body[0].weight.shape[0] < callback.teacher.body[0].weight.shape[0] == 16


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str)
def test_it_works_with(options):
    callback = Distillation(weight=1.0)
    _, trained = fit(callback, **options)
    assert len(trained.losses) == 24 and trained.losses[0] < 0.5  # the teacher itself, but for dropout


@pytest.mark.parametrize("kill_at", [1, 9, 12, 20])
def test_a_killed_run_goes_on_bit_for_bit(kill_at, tmp_path):
    def run(folder, kill_at=None, ckpt_path=None):
        callback = pruning()
        fitted, trained = fit(Distillation(), callback, DyingCheckpoint(folder, kill_at), ckpt_path=ckpt_path)
        return everything(fitted, trained, callback)

    whole = run(tmp_path / "whole")
    in_a_process_that_dies(lambda: run(tmp_path, kill_at))
    assert_equal(whole, run(tmp_path, ckpt_path=tmp_path / f"step={kill_at}.ckpt"))


def test_a_checkpoint_can_be_the_teacher(tmp_path):
    fitted, dense = fit()
    fitted.save_checkpoint(tmp_path / "dense.ckpt")
    callback = Distillation(teacher=tmp_path / "dense.ckpt")
    fit(callback)
    assert all(
        torch.equal(a, b) for a, b in zip(callback.teacher.parameters(), dense.parameters(), strict=True)
    )
    assert set(callback.state_dict()) == {"output"}
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="`teacher` is a model of the same kind"):
        fit(Distillation(teacher=tmp_path / "other.ckpt"))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Distillation(weight=1.5), r"`weight` is a number in \[0, 1\], but got 1.5"),
        (lambda: Distillation(temperature=0.0), "`temperature` is a number above 0"),
        (
            lambda: fit(Distillation(output="heat")),
            "`output` has paths of modules, but got 'heat'. Did you mean head",
        ),
        (lambda: fit(Distillation(features=["body.9"])), "`features` has paths of modules, but got 'body.9'"),
    ],
)
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_manual_optimization_is_refused():
    with pytest.raises(ValueError, match="`automatic_optimization` is True with Distillation"):
        trainer(Distillation()).fit(GAN(), data())
