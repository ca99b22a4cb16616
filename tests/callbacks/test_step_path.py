"""What pruning costs between updates: a pass over the weights, no wait for a device, no statistics, a byte a weight."""

import math

import lightning as L
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune import (
    Channel,
    Dormant,
    Fisher,
    Linear,
    Magnitude,
    Movement,
    PerRow,
    Saliency,
    SparseTraining,
    StraightThrough,
    TrainTimePruning,
    Wanda,
    Window,
)
from tests.callbacks.toy import NUM_BATCHES, Toy, data, trainer

WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "unique",
    "_unique2",
}
"""Operations whose result has a size or a value that the processor must know: on a GPU it waits for all before them."""
WINDOW = Window(start=4, end=16, every=4, unit="steps")


class Seen(TorchDispatchMode):
    """The names of all operations inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


class Watched:
    """Notes what a callback's hooks run, batch by batch, and whether it was updated in them."""

    HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "_after_step", "on_train_batch_end")

    def __init__(self, callback):
        self.callback, self.batches, self.now = callback, [], []
        for name in self.HOOKS:
            setattr(callback, name, self.watched(name, getattr(callback, name)))

    def watched(self, name, inner):
        def hook(*args, **kwargs):
            before = len(self.callback.updates)
            with Seen() as seen:
                inner(*args, **kwargs)
            self.now.append((seen.names, len(self.callback.updates) > before))
            if name == "on_train_batch_end":
                self.batches.append(
                    ([n for names, _ in self.now for n in names], any(up for _, up in self.now))
                )
                self.now = []

        return hook


KINDS = {
    "magnitude": lambda **k: TrainTimePruning(0.5, **k),
    "channels": lambda **k: TrainTimePruning(0.5, granularity=Channel(), shrink="never", **k),
    "movement": lambda **k: TrainTimePruning(0.5, criterion=Movement(), **k),
    "fisher": lambda **k: TrainTimePruning(0.5, criterion=Fisher(), **k),
    "saliency": lambda **k: TrainTimePruning(0.5, criterion=Saliency(), **k),
    "wanda": lambda **k: TrainTimePruning(0.5, criterion=Wanda(), scope=PerRow(), **k),
    "straight through": lambda **k: TrainTimePruning(0.5, masking=StraightThrough(), **k),
    "dormant": lambda **k: TrainTimePruning(0.5, masking=Dormant(), **k),
    "rigl": lambda **k: SparseTraining(0.5, **k),
}


@pytest.mark.parametrize("kind", KINDS)
def test_between_updates_nothing_waits_for_the_device(kind):
    watched = Watched(KINDS[kind](window=WINDOW, report=False))
    trainer(watched.callback).fit(Toy(), data(), data())
    quiet = [
        set(names) for names, is_update in watched.batches[1:] if not is_update
    ]  # the first one is traced
    assert len(watched.batches) == 4 * NUM_BATCHES and len(quiet) >= len(watched.batches) - 5
    assert [names & WAITS for names in quiet if names & WAITS] == []
    assert any(
        names & WAITS for names, up in ((set(n), u) for n, u in watched.batches) if up
    )  # they would be seen


class Hooks(L.Callback):
    """Counts in each batch the forward hooks that are set, and the gradients that are noted."""

    def __init__(self, callback):
        self.callback, self.set, self.noted = callback, [], []

    def on_train_start(self, trainer, pl_module):
        statistics = self.callback.pruner.statistics
        note = statistics.note_gradients
        statistics.note_gradients = lambda *args, **kwargs: (
            self.noted.append(trainer.fit_loop.total_batch_idx),
            note(*args, **kwargs),
        )

    def on_before_backward(self, trainer, pl_module, loss):
        self.set.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.modules()))


def test_activations_are_watched_only_where_an_update_is_near():
    callback = TrainTimePruning(0.5, criterion=Wanda(), scope=PerRow(), window=WINDOW, report=False)
    hooks = Hooks(callback)
    trainer(callback, hooks).fit(Toy(), data(), data())
    steps = [update["step"] for update in callback.updates]
    assert steps == [4, 8, 12, 16] and len(hooks.set) == 24
    watched = [step for step, number in enumerate(hooks.set, 1) if number]
    assert set(steps) <= set(watched) and all(any(0 <= step - w <= 1 for step in steps) for w in watched)


def test_gradients_are_noted_only_where_an_update_is_due():
    callback = TrainTimePruning(0.5, criterion=Saliency(), window=WINDOW, report=False)
    hooks = Hooks(callback)
    trainer(callback, hooks).fit(Toy(), data(), data())
    assert (
        [batch + 1 for batch in hooks.noted]
        == [update["step"] for update in callback.updates]
        == [4, 8, 12, 16]
    )


def test_weights_alone_need_no_statistics_at_all():
    callback = TrainTimePruning(0.5, criterion=Magnitude(), window=WINDOW, report=False)
    hooks = Hooks(callback)
    trainer(callback, hooks).fit(Toy(), data(), data())
    assert hooks.noted == [] and not any(hooks.set)


def storages(found, known, seen):
    """The bytes of each storage that can be reached from an object of ours, but for those that are known."""
    if id(found) in seen:
        return {}
    seen.add(id(found))
    if isinstance(found, FakeTensor):
        return {}
    if torch.is_tensor(found):
        storage = found.untyped_storage()
        return {} if storage.data_ptr() in known else {storage.data_ptr(): storage.nbytes()}
    inside = ()
    if isinstance(found, dict):
        inside = found.values()
    elif isinstance(found, (list, tuple, set)):
        inside = found
    elif type(found).__module__.startswith("lightning_prune"):
        inside = vars(found).values() if hasattr(found, "__dict__") else ()
    return {key: size for entry in inside for key, size in storages(entry, known, seen).items()}


@pytest.mark.parametrize("make", [KINDS["magnitude"], KINDS["rigl"]])
def test_masks_take_a_byte_a_weight_live_and_a_bit_in_a_checkpoint(make):
    module = Toy()
    run = trainer(callback := make(window=WINDOW, report=False))
    run.fit(module, data(), data())
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    total = sum(callback.pruner.targets[name].numel() for name in callback.masks)
    assert 0 < sum(storages(callback, known, set()).values()) <= total + 64 * len(callback.masks)
    packed = storages(callback.state_dict()["pruner"], known, set())
    assert sum(packed.values()) <= sum(math.ceil(mask.numel() / 8) for mask in callback.masks.values())


def test_a_mask_is_all_that_is_kept_of_a_large_layer():
    """Nothing of the selection stays: no scores, no copy of the weights."""
    module = Toy()
    module.body[0], module.body[1] = torch.nn.Linear(8, 4096), torch.nn.BatchNorm1d(4096)
    module.body[4] = torch.nn.Linear(4096, 8)
    callback = TrainTimePruning(0.9, schedule=Linear(), window=WINDOW, report=False)
    trainer(callback).fit(module, data(), data())
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    numel = sum(mask.numel() for mask in callback.masks.values())
    assert sum(storages(callback, known, set()).values()) <= 1.001 * numel
