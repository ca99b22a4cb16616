"""What users write in their steps: skipped batches, iterators, lists of outputs, and counters, run beside training."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import (
    Channel,
    Distillation,
    InitialPruning,
    LeastSquares,
    PerRow,
    PostTrainingPruning,
    Saliency,
    TrainTimePruning,
    Wanda,
    WoodFisher,
)
from tests.callbacks.toy import GAN, NUM_BATCHES, Toy, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
WEIGHTS = {"sparsity": 0.5, "report": False}
CHANNELS = {**WEIGHTS, "granularity": Channel(multiple_of=1), "include": ["body"]}
BY_INPUTS = {**WEIGHTS, "criterion": Wanda(), "scope": PerRow()}
CALLBACKS = {
    "channels in training": lambda: TrainTimePruning(**CHANNELS),
    "channels after training": lambda: PostTrainingPruning(**CHANNELS),
    "channels before training": lambda: InitialPruning(**CHANNELS),
    "gradients before training": lambda: InitialPruning(**WEIGHTS),
    "activations in training": lambda: TrainTimePruning(**BY_INPUTS),
    "activations after training": lambda: PostTrainingPruning(**BY_INPUTS),
}


def fitted(module, *callbacks):
    trainer(*callbacks).fit(module, data(), data())
    return module


class SkipsFirst(Toy):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


class SkipsByContent(Toy):
    """Skips what is like the first batch."""

    def training_step(self, batch, batch_idx):
        first, _ = next(iter(data()))
        return None if torch.equal(batch[0], first) else super().training_step(batch, batch_idx)


class Iterates(Toy):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize("kind", [SkipsFirst, SkipsByContent, Iterates])
@pytest.mark.parametrize("name", CALLBACKS)
def test_steps_that_skip_batches_or_read_them_themselves_can_be_pruned(kind, name):
    module = fitted(kind(), CALLBACKS[name]())
    weight = module.body[0].weight
    assert weight.shape != (16, 8) if "channels" in name else float((weight == 0).float().mean()) > 0.2


def test_a_skipped_batch_counts_for_nothing_in_a_mean_gradient():
    skipping, whole = (InitialPruning(num_calibration_batches=num, **WEIGHTS) for num in (NUM_BATCHES, 5))
    fitted(SkipsByContent(), skipping)
    _, *others = data()
    trainer(whole).fit(Toy(), DataLoader(others, batch_size=None), data())
    for name, mask in whole.masks.items():
        assert torch.equal(skipping.masks[name], mask)


def test_a_batch_that_was_skipped_teaches_nothing():
    distilled = Distillation()
    module = fitted(SkipsFirst(), distilled)
    assert module.get_submodule(distilled.output) is module


class Detects(Toy):
    """Gives losses where it trains, and boxes else, as torchvision's detectors do."""

    def forward(self, x, y=None):
        if self.training:
            return {"classes": F.cross_entropy(super().forward(x), y), "boxes": x.sum() * 0}
        return [{"boxes": row, "scores": row.max()} for row in super().forward(x)]

    def training_step(self, batch, batch_idx):
        return sum(self(*batch).values())

    def validation_step(self, batch, batch_idx):
        self(*batch)


@pytest.mark.parametrize(
    "build",
    [
        *CALLBACKS.values(),
        lambda: PostTrainingPruning(**WEIGHTS, criterion=Saliency()),
        lambda: PostTrainingPruning(**WEIGHTS, solver=LeastSquares()),
        lambda: PostTrainingPruning(**CHANNELS, reestimate_batch_norm=True, solver=LeastSquares()),
        lambda: PostTrainingPruning(**WEIGHTS, solver=WoodFisher()),
        lambda: InitialPruning(**WEIGHTS, num_rounds=3),
    ],
)
def test_a_step_that_needs_to_be_told_that_it_trains_is_told_and_all_else_is_alike(build):
    """Dropout and batch norms go on as they do in other models: the same weights go, the same ones stay."""
    found, expected = fitted(Detects(), build()).state_dict(), fitted(Toy(), build()).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_an_error_that_training_mode_does_not_mend_is_raised_as_it_is():
    class Broken(Detects):
        def training_step(self, batch, batch_idx):
            if self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
                raise RuntimeError("no losses at all")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="no losses at all"):
        fitted(Broken(), InitialPruning(**WEIGHTS))


class Remembers(Toy):
    """Keeps what its steps give, how many there were and which, as epoch-end hooks read it."""

    def __init__(self):
        super().__init__()
        self.outputs, self.by_index, self.indices, self.num_steps, self.last = [], {}, set(), 0, None
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(float(loss.detach()))
        self.by_index[batch_idx] = float(loss.detach())
        self.indices.add(batch_idx)
        self.num_steps += 1
        self.last = float(loss.detach())
        return loss

    def on_train_start(self):
        self.seen.append(
            (len(self.outputs), len(self.by_index), len(self.indices), self.num_steps, self.last)
        )

    def on_train_epoch_end(self):
        self.seen.append((len(self.outputs), len(self.by_index), len(self.indices), self.num_steps))


@pytest.mark.parametrize("name", [*CALLBACKS, "distillation"])
def test_steps_beside_training_leave_nothing_in_the_attributes_of_the_module(name):
    pruning = CALLBACKS[name]() if name in CALLBACKS else Distillation()
    module = fitted(Remembers(), pruning)
    steps = [NUM_BATCHES * epoch for epoch in range(1, 5)]
    assert module.seen == [(0, 0, 0, 0, None), *((n, NUM_BATCHES, NUM_BATCHES, n) for n in steps)]
    assert module.num_steps == steps[-1] and module.last == module.outputs[-1]


class Indexed(Toy):
    """Learns from a batch as from no other, by its index."""

    given = ()

    def training_step(self, batch, batch_idx):
        type(self).given += ((batch_idx, float(batch[0][0, 0])),)
        return super().training_step(batch, batch_idx)


def test_batches_of_calibration_have_their_indices(monkeypatch):
    monkeypatch.setattr(Indexed, "given", ())
    fitted(Indexed(), InitialPruning(num_calibration_batches=3, num_rounds=2, **WEIGHTS))
    first = [float(x[0, 0]) for x, _ in data()]
    assert Indexed.given[:6] == (*enumerate(first[:3]), *enumerate(first[:3]))


class SeveralLoaders(Toy):
    """Trains by hand, so that its step of validation runs on the batches of calibration."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), add_dataloader_idx=True)


def test_a_step_that_asks_for_the_index_of_its_loader_is_told():
    module = SeveralLoaders()
    module.automatic_optimization = False
    trainer(TrainTimePruning(**CHANNELS)).fit(module, data(), [data(), data()])
    assert module.body[0].weight.shape != (16, 8)


def test_manual_optimization_without_a_validation_step_is_told_what_is_missing():
    pruning = TrainTimePruning(0.5, granularity=Channel(multiple_of=1), include=["generator"], report=False)
    with pytest.raises(ValueError, match="`validation_step` runs GAN on a batch .* but there is none"):
        trainer(pruning).fit(GAN(), data())


class Stream(IterableDataset):
    """Goes on where it was each time that it is read."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        for _ in range(NUM_BATCHES):
            self.place += 1
            draw = torch.Generator().manual_seed(self.place)
            yield torch.randn(8, 8, generator=draw), torch.randint(0, 4, (8,), generator=draw)


class Reads(Toy):
    """Notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.read = []

    def training_step(self, batch, batch_idx):
        self.read.append(float(batch[0][0, 0]))
        return super().training_step(batch, batch_idx)


def test_a_stream_that_keeps_its_own_place_loses_no_batch_to_calibration():
    plain, pruned = Reads(), Reads()
    for module, callbacks in ((plain, ()), (pruned, (InitialPruning(**WEIGHTS),))):
        trainer(*callbacks, max_epochs=2).fit(module, DataLoader(Stream(), batch_size=None), data())
    assert len(plain.read) == 2 * NUM_BATCHES and pruned.read == plain.read
