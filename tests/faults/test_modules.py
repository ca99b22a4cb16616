"""Modules that change while they train, callbacks that meet on one model, fits that come again, and Ctrl-C."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import (
    Channel,
    InitialPruning,
    PostTrainingPruning,
    SparseTraining,
    TrainTimePruning,
    WeightRewinding,
    Window,
)
from tests.callbacks.toy import NUM_BATCHES, Toy, data, pruned_weights, trainer

MAKE = {
    "train_time": lambda **more: TrainTimePruning(0.5, report=False, **more),
    "sparse": lambda **more: SparseTraining(0.5, report=False, **more),
    "initial": lambda **more: InitialPruning(0.5, report=False, **more),
    "rewinding": lambda **more: WeightRewinding(0.5, num_levels=1, report=False, **more),
    "post": lambda **more: PostTrainingPruning(0.5, report=False, **more),
    "structured": lambda **more: TrainTimePruning(0.5, granularity=Channel(), report=False, **more),
}
HOLDING = [name for name in MAKE if name != "post"]


def holds(module, callback):
    return not any(bool(w.any()) for w in pruned_weights(module, callback))


class AtEpoch(L.Callback):
    """Does something to the module when its second epoch starts."""

    def __init__(self, change):
        self.change = change

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.change(trainer, pl_module)


def replaced(_, module):
    module.body[4] = nn.Linear(16, 8)


@pytest.mark.parametrize("name", HOLDING)
def test_a_module_that_is_replaced_in_mid_training_is_no_silent_loss(name):
    with pytest.raises(
        ValueError, match=r"`body\.4\.weight` is pruned, but was taken out of the module or replaced"
    ):
        trainer(AtEpoch(replaced), MAKE[name](), max_epochs=3).fit(Toy(), data(), data())


class Leaving(Toy):
    """Has layers one of which is deleted when its second epoch starts, and goes on without it."""

    def __init__(self, gone):
        super().__init__()
        self.gone, self.outer = gone, nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        for name in ("outer", "inner"):
            x = x + getattr(self, name)(x) if hasattr(self, name) else x
        return super().forward(x)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            delattr(self, self.gone)


@pytest.mark.parametrize("shrink", ["end", "update", "never"])
def test_a_coupled_layer_that_is_deleted_in_mid_training_is_named(shrink):
    callback = MAKE["structured"](shrink=shrink)
    with pytest.raises(ValueError, match=r"`inner\.0\.weight` is pruned, but was taken out of the module"):
        trainer(callback, max_epochs=3).fit(Leaving("inner"), data(), data())


@pytest.mark.parametrize("shrink", ["end", "update", "never"])
def test_one_of_which_nothing_is_pruned_may_go(shrink):
    module = Leaving("outer")
    trainer(MAKE["structured"](shrink=shrink), max_epochs=3).fit(module, data(), data())
    assert (module.inner[0].out_features < 16) is (shrink != "never")


def test_two_that_make_the_fit_longer_are_refused():
    callbacks = [MAKE["rewinding"](include=[name]) for name in ("head", "body.0")]
    with pytest.raises(ValueError, match="`callbacks` has one WeightRewinding, .* but got two"):
        trainer(*callbacks, max_epochs=3).fit(Toy(), data(), data())


class AtStep(L.Callback):
    """Does something to the module after its second step of the last epoch."""

    def __init__(self, change):
        self.change = change

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == trainer.max_epochs - 1 and batch_idx == 1:
            self.change(trainer, pl_module)


@pytest.mark.parametrize(
    "name", sorted({*HOLDING} - {"structured"})
)  # the smaller model fails with it by itself
def test_a_module_that_is_replaced_within_the_last_epoch_is_no_silent_loss_either(name):
    with pytest.raises(ValueError, match=r"`body\.4\.weight` is pruned, but was taken out of the module"):
        trainer(AtStep(replaced), MAKE[name](), max_epochs=2).fit(Toy(), data(), data())


@pytest.mark.parametrize("name", ["train_time", "sparse", "initial", "structured", "post"])
def test_a_module_that_is_added_in_mid_training_trains_along(name):
    def added(trainer, module):
        module.extra = nn.Linear(4, 4)
        trainer.optimizers[0].add_param_group({"params": module.extra.parameters()})

    module, callback = Toy(), MAKE[name]()
    trainer(AtEpoch(added), callback, enable_checkpointing=False).fit(module, data(), data())
    assert callback.pruner.sparsity == pytest.approx(0.5, abs=0.1) and holds(module, callback)
    assert ("extra.weight" in callback.pruner.targets) == (name == "post")


class Changing(Toy):
    """Changes what it runs when its second epoch starts; its own hook comes after those of the callbacks."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.change(self)


CHANGES = {
    "body.6": lambda module: module.body.append(nn.Linear(8, 8)),
    "body.0": lambda module: module.body.insert(0, nn.Linear(8, 8)),
    "body.5": lambda module: module.body.insert(5, nn.Sequential(nn.Linear(8, 8), nn.Tanh())),
}


@pytest.mark.parametrize("shrink", ["end", "update", "never"])
@pytest.mark.parametrize("added", CHANGES)
def test_a_layer_that_is_added_between_coupled_ones_is_refused_by_its_name(added, shrink):
    """Also where the model, smaller by now, cannot run with it."""
    callback = MAKE["structured"](shrink=shrink, window=Window(every=0.05))
    fit = trainer(callback)
    with pytest.raises(ValueError, match=rf"`{added}[.0]*` runs in the model, but was added .* second fit"):
        fit.fit(Changing(CHANGES[added]), data(), data())
    assert fit.global_step == NUM_BATCHES


def test_a_coupled_layer_that_is_replaced_after_the_callbacks_have_looked_is_refused():
    with pytest.raises(ValueError, match=r"`body\.4\.weight` is pruned, but was taken out of the module"):
        trainer(MAKE["structured"]()).fit(Changing(lambda module: replaced(None, module)), data(), data())


def test_pruned_layers_that_change_their_places_are_refused():
    def moved(module):
        module.body[0], module.body[4] = module.body[4], module.body[0]

    with pytest.raises(ValueError, match=r"`body\.0\.weight` is pruned, but was .* replaced in it since"):
        trainer(MAKE["structured"]()).fit(Changing(moved), data(), data())


def unused(module):
    module.body[1].probe = nn.Linear(8, 8)


def activation(module):
    module.body[2] = nn.Tanh()


@pytest.mark.parametrize("change", [unused, activation])
def test_what_couples_nothing_may_be_added(change):
    module, callback = Changing(change), MAKE["structured"]()
    trainer(callback).fit(module, data(), data())
    assert callback.pruner.sparsity == pytest.approx(0.5, abs=0.1) and module.body[0].out_features == 8


def test_layers_may_be_added_once_pruning_is_over():
    module = Changing(CHANGES["body.0"])
    callback = MAKE["structured"](window=Window(end=0.2, every=0.05))
    trainer(callback).fit(module, data(), data())
    assert module.body[1].out_features == 8 and callback.is_final


def test_what_was_added_cannot_be_rewound():
    def added(trainer, module):
        module.extra = nn.Linear(4, 4)

    with pytest.raises(ValueError, match=r"(?s)a module that has changed since: .*extra\.weight"):
        trainer(AtEpoch(added), MAKE["rewinding"](), max_epochs=2).fit(Toy(), data(), data())


def test_two_callbacks_prune_weights_of_their_own():
    module = Toy()
    first, second = (
        TrainTimePruning(0.5, include=["body"], report=False),
        SparseTraining(0.75, include=["head"]),
    )
    second.report = False
    trainer(first, second).fit(module, data(), data())
    assert holds(module, first) and holds(module, second)
    assert (first.pruner.sparsity, second.pruner.sparsity) == (0.5, 0.75)


def test_channels_and_weights_of_one_model():
    module = Toy()
    first = TrainTimePruning(0.5, granularity=Channel(), include=["body.0"], report=False)
    second = TrainTimePruning(0.75, include=["head"], report=False)
    trainer(first, second).fit(module, data(), data())
    assert module.body[0].weight.shape == (8, 8) and module.body[4].weight.shape == (8, 8)
    assert holds(module, second) and second.pruner.sparsity == 0.75


@pytest.mark.parametrize("second", ["train_time", "sparse", "initial", "structured"])
def test_two_callbacks_for_one_weight_are_refused(second):
    first = TrainTimePruning(0.5, include=["head", "body.4"], report=False)
    with pytest.raises(
        ValueError, match="`callbacks` prune weights of their own each, but got .*body.4.weight"
    ):
        trainer(first, MAKE[second]()).fit(Toy(), data(), data())


@pytest.mark.parametrize("name", MAKE)
def test_a_second_fit_holds_what_the_first_has_pruned(name):
    module, callback = Toy(), MAKE[name]()
    sizes = []
    for _ in range(2):
        trainer(callback, max_epochs=2, enable_checkpointing=False).fit(module, data(), data())
        assert callback.pruner.sparsity == pytest.approx(0.5, abs=0.1) and holds(module, callback)
        sizes.append([tuple(p.shape) for p in module.parameters()])
    assert sizes[0] == sizes[1]


def test_rewinding_does_not_begin_anew_in_a_second_fit():
    module, callback = Toy(), WeightRewinding(0.5, num_levels=2, report=False)
    trainer(callback, max_epochs=1).fit(module, data(), data())
    levels = list(callback.levels)
    again = trainer(callback, max_epochs=1)
    again.fit(module, data(), data())
    assert again.global_step == NUM_BATCHES and callback.levels == levels and holds(module, callback)


class Complete(Toy):
    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.parametrize("name", MAKE)
def test_a_model_is_evaluated_before_and_after_it_is_fitted(name):
    module, callback = Complete(), MAKE[name]()
    run = trainer(callback, max_epochs=2, enable_checkpointing=False)
    for _ in range(2):
        run.validate(module, data(), verbose=False)
        run.test(module, data(), verbose=False)
        assert len(run.predict(module, data())) == NUM_BATCHES
        if run.global_step == 0:
            assert callback.pruner is None
            run.fit(module, data(), data())
    assert holds(module, callback)


class Interrupts(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 9:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("name", MAKE)
def test_a_run_that_is_interrupted_leaves_no_hook_and_can_go_on(name, tmp_path):
    module, callback = Toy(), MAKE[name]()
    saving = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    run = trainer(Interrupts(), callback, saving)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(module, data(), data())
    assert run.global_step == 9 and not any(
        m._forward_hooks or m._forward_pre_hooks for m in module.modules()
    )
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    assert callback.pruner is None or holds(module, callback)
    module, callback = Toy(), MAKE[name]()
    again = trainer(callback, enable_checkpointing=False)
    again.fit(module, data(), data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.global_step > 9 and callback.pruner.sparsity == pytest.approx(0.5, abs=0.1)
    assert holds(module, callback)
