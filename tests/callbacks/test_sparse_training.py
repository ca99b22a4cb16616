"""Sparse training: the density is exact at every step, and what grows starts at zero, where the gradient is largest."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_prune import (
    ERK,
    Fisher,
    Global,
    GradientMagnitude,
    Local,
    Magnitude,
    MeanGradient,
    NofM,
    PerRow,
    Polynomial,
    Random,
    SparseTraining,
    Window,
)
from lightning_prune.examples.loading import as_sliced
from lightning_prune.model.gradients import Gradients
from tests.callbacks.toy import GAN, NUM_BATCHES, Toy, Witness, data, trainer

EVERY = Window(end=0.75, every=0.1)


def active(callback):
    return {name: int(mask.sum()) for name, mask in callback.masks.items()}


class Watch(Toy):
    """Looks at masks, weights and momenta after each step."""

    def __init__(self, callback, **options):
        super().__init__(**options)
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, *_):
        parameters, (optimizer,) = dict(self.named_parameters()), self.trainer.optimizers
        masks = {name: mask.clone() for name, mask in self.callback.masks.items()}
        weights = {name: parameters[name].detach().clone() for name in masks}
        states = {name: dict(optimizer.state[parameters[name]]) for name in masks}
        momenta = {n: s.get("exp_avg", s.get("momentum_buffer")).clone() for n, s in states.items()}
        self.seen.append((masks, weights, momenta))


def fit(module=Watch, accumulate=1, options=None, **settings):
    callback = SparseTraining(**{"sparsity": 0.75, "window": EVERY, "report": False, **settings})
    trained = module(callback, **(options or {}))
    trainer(callback, accumulate_grad_batches=accumulate).fit(trained, data(shuffle=True), data())
    return callback, trained


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("grow", [None, Random(seed=1)], ids=["gradient", "random"])
def test_the_number_of_active_weights_never_changes_and_their_places_do(optimizer, grow):
    options = {"optimizer": optimizer, **({"momentum": 0.9} if optimizer == "SGD" else {})}
    callback, trained = fit(options=options, **({"grow": grow} if grow else {}))
    numbers = [{name: int(mask.sum()) for name, mask in masks.items()} for masks, _, _ in trained.seen]
    assert all(number == numbers[0] for number in numbers)
    sizes = {name: mask.numel() for name, mask in callback.masks.items()}
    assert sum(numbers[0].values()) == sum(sizes.values()) - round(0.75 * sum(sizes.values()))
    places = [masks["body.0.weight"] for masks, _, _ in trained.seen]
    moved = [int((a ^ b).sum()) for a, b in pairwise(places)]
    assert max(moved) > 0 and moved[-4:] == [0] * 4  # the window ends at 75 % of 24 steps


def test_what_grows_starts_at_zero_and_so_does_its_momentum():
    _, trained = fit(drop_fraction=0.5, decay=None)
    grown = 0
    for (before, _, _), (masks, weights, momenta) in pairwise(trained.seen):
        for name, mask in masks.items():
            new = mask & ~before[name]
            grown += int(new.sum())
            assert not weights[name][new].any() and not momenta[name][new].any()
            assert not weights[name][~mask].any()
    assert grown > 20


@pytest.mark.parametrize(
    ("grow", "criterion", "is_mean"),
    [
        (GradientMagnitude(), Magnitude(), False),
        (MeanGradient(), Magnitude(), True),
        (GradientMagnitude(), Fisher(), False),  # which looks at all steps
    ],
    ids=str,
)
def test_it_grows_where_the_gradient_is_largest(grow, criterion, is_mean):
    """The masks of an update against the algorithm by hand, on the gradient of the batch before it, or of all since."""
    callback, found, since = None, [], []

    class Shown(Toy):
        def on_before_optimizer_step(self, optimizer):
            since.append({n: p.grad.detach().clone() for n, p in self.named_parameters()})
            used = since if is_mean else since[-1:]
            self.grads = {n: sum(grads[n] for grads in used) / len(used) for n in since[-1]}
            if callback.ramp.is_due:
                since.clear()
            self.masks = {name: mask.clone() for name, mask in callback.masks.items()}

        def on_train_batch_end(self, *_):
            found.append((self.masks, self.grads, {n: m.clone() for n, m in callback.masks.items()}))

    options = {"window": EVERY, "drop_fraction": 0.5, "decay": None, "report": False}
    callback = SparseTraining(0.75, grow=grow, criterion=criterion, **options)
    trainer(callback).fit(Shown(), data(shuffle=True), data())
    num_updates = 0
    for before, grads, after in found:
        for name, mask in before.items():
            if torch.equal(mask, after[name]):
                continue
            num_updates += 1
            new = after[name] & ~mask
            others = ~after[name] & ~mask  # these were free too
            assert grads[name].abs()[new].min() >= grads[name].abs()[others].max()
    assert num_updates > 10


@pytest.mark.parametrize(("grow", "is_mean"), [(GradientMagnitude(), False), (MeanGradient(), True)], ids=str)
def test_gradients_are_read_in_no_step_that_does_not_count(grow, is_mean, monkeypatch):
    """What goes by the last batch reads those before the masks change; the mean, all while there is a ramp."""
    read, expected = [], []

    class Counted(Toy):
        def on_before_optimizer_step(self, optimizer):
            if callback.ramp.is_due or (is_mean and not callback.ramp.is_over):
                expected.append(self.global_step)

    def noted(*args):
        read.append(trained.global_step)
        note(*args)

    note = Gradients.note
    monkeypatch.setattr(Gradients, "note", noted)
    callback = SparseTraining(0.75, grow=grow, window=EVERY, report=False)
    trained = Counted()
    trainer(callback).fit(trained, data(shuffle=True), data())
    assert read == expected and 4 < len(read) < callback.ramp.num_steps
    assert is_mean or len(read) == sum(update["step"] > 0 for update in callback.updates)


def test_the_gradient_is_that_of_all_accumulated_batches():
    """Three batches of a third make the masks of one whole batch."""

    class Plain(Toy):
        def __init__(self):
            super().__init__("SGD", lr=0.1)
            self.body = torch.nn.Sequential(self.body[0], torch.nn.ReLU(), self.body[4], torch.nn.ReLU())

    def masks(size, accumulate):
        callback = SparseTraining(0.75, window=Window(end=1.0, every=1, unit="epochs"), report=False)
        batches = DataLoader(data().dataset, batch_size=size, collate_fn=as_sliced)
        trainer(callback, max_epochs=2, accumulate_grad_batches=accumulate).fit(Plain(), batches, data())
        return callback.masks

    whole, parts = masks(48, 1), masks(16, 3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_no_forward_pass_sees_a_weight_that_should_be_zero():
    callback = SparseTraining(0.75, window=EVERY, report=False)
    witness = Witness(callback)
    trainer(callback, witness).fit(Toy(), data(shuffle=True), data())
    assert witness.reads > 20 and witness.violations == 0


def test_two_optimizers_by_hand():
    callback = SparseTraining(0.5, window=EVERY, report=False)
    trainer(callback).fit(GAN(), data(shuffle=True))
    total = sum(mask.numel() for mask in callback.masks.values())
    assert sum(active(callback).values()) == total - round(0.5 * total)


def test_gradual_pruning_with_regrowth_starts_dense_and_ends_at_the_sparsity():
    callback, trained = fit(schedule=Polynomial(), scope=Global(), sparsity=0.9)
    sparsities = [update["achieved"] for update in callback.updates]
    assert sparsities[0] == 0.0 and sparsities == sorted(sparsities)
    assert callback.pruner.sparsity == pytest.approx(0.9, abs=2e-3)
    regrown = [
        bool((after[name] & ~before[name]).any())
        for (before, _, _), (after, _, _) in pairwise(trained.seen)
        for name in before
    ]
    assert any(regrown)


def test_each_row_keeps_as_many_weights_at_all_times():
    _, trained = fit(scope=PerRow())
    for masks, _, _ in trained.seen:
        for mask in masks.values():
            assert len(set(mask.sum(1).tolist())) == 1


def test_n_of_m_holds_at_all_times():
    _, trained = fit(scope=NofM(n=1, m=4), sparsity=None)
    changed = trained.seen[0][0]["body.0.weight"] ^ trained.seen[-1][0]["body.0.weight"]
    assert changed.any()
    for masks, _, _ in trained.seen:
        for mask in masks.values():
            assert (mask.view(-1, 4).sum(1) == 1).all()


@pytest.mark.parametrize("scope", [ERK(), Local()], ids=["erk", "uniform"])
def test_static_training_starts_by_the_scope_and_stays(scope):
    callback, trained = fit(scope=scope, drop_fraction=0.0)
    first, last = trained.seen[0][0], trained.seen[-1][0]
    assert all(torch.equal(first[name], last[name]) for name in first)
    shapes = {name: torch.rand(mask.shape) for name, mask in first.items()}
    assert active(callback) == {name: int(mask.sum()) for name, mask in scope(shapes, 0.75).items()}


def test_the_first_forward_pass_is_sparse_already():
    seen = []

    class First(Toy):
        def training_step(self, batch, batch_idx):
            seen.append(int((self.body[0].weight == 0).sum()))
            return F.cross_entropy(self(batch[0]), batch[1])

    callback = SparseTraining(0.75, scope=Local(), window=EVERY, report=False)
    trainer(callback).fit(First(), data(), data())
    assert seen[0] == 96 and len(seen) == 4 * NUM_BATCHES
