"""A record makes a freshly built dense model small again, or says why it cannot and leaves the model alone."""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune import Channel, ReplaysRecord, TrainTimePruning, load_pruned
from lightning_prune.graph import Plan
from lightning_prune.graph.plan_data import VERSION, to_data
from lightning_prune.model.history import KEY, plans_of, read_record
from lightning_prune.model.record import replay_, shrink_to_
from lightning_prune.model.surgery import execute_
from tests.callbacks.toy import Toy, data, trainer


class Lit(Toy):
    """Of variable width, with hyperparameters and hooks of its own."""

    def __init__(self, width: int = 16, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body[0], self.body[1], self.body[4] = (
            nn.Linear(8, width),
            nn.BatchNorm1d(width),
            nn.Linear(width, 8),
        )
        self.loaded = None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint):
        self.loaded = checkpoint["mine"], self.body[0].out_features

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class Replaying(ReplaysRecord, Lit):
    pass


def plan_of(model, kept):
    names = [
        "body.0.weight",
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
        "body.1.running_mean",
        "body.1.running_var",
    ]
    slices = dict.fromkeys(names, 0) | {"body.4.weight": 1}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Plan(
        {n: {d: tuple(kept)} for n, d in slices.items()}, {n: tuple(t.shape) for n, t in tensors.items()}
    )


def pruned(cls=Lit, times=2):
    module = cls()
    for kept in [(0, 2, 3, 5, 8, 9, 14), (1, 2, 6)][:times]:
        execute_(module, plan_of(module, kept))
    return module


def save(module, path, **options):
    """Through a trainer, as Lightning writes checkpoints, and without any callback of ours."""
    fit = trainer(max_epochs=1, default_root_dir=path.parent)
    fit.fit(module, data(), data())
    fit.save_checkpoint(path, **options)
    return path


def assert_same(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights_only"])
@pytest.mark.parametrize("load", [lambda path: load_pruned(Lit, path), None], ids=["load_pruned", "mixin"])
def test_a_checkpoint_of_a_small_model_loads(tmp_path, load, weights_only):
    small = pruned(Lit if load else Replaying)
    path = save(small, tmp_path / "small.ckpt", weights_only=weights_only)
    loaded = load(path) if load else Replaying.load_from_checkpoint(path, weights_only=True)
    assert type(loaded) is type(small) and loaded.body[0].out_features == loaded.body[4].in_features == 3
    assert_same(loaded, small)
    assert plans_of(loaded) == plans_of(small) and len(plans_of(loaded)) == 2
    assert loaded.loaded == (7, 3)  # the module's own hook ran, and saw the small module


def test_the_class_is_as_it_was(tmp_path):
    path = save(pruned(), tmp_path / "small.ckpt")
    before = dict(vars(Lit)), dict(vars(Toy))
    load_pruned(Lit, path)
    with pytest.raises(TypeError):
        load_pruned(Lit, path, width="x")
    assert (dict(vars(Lit)), dict(vars(Toy))) == before
    with pytest.raises(
        RuntimeError, match="size mismatch"
    ):  # the negative control: without a record, nothing fits
        Lit.load_from_checkpoint(path, weights_only=True)


def test_a_hook_that_is_inherited_stays_inherited(tmp_path):
    class Child(Lit):
        pass

    loaded = load_pruned(Child, save(pruned(), tmp_path / "small.ckpt"))
    assert "on_load_checkpoint" not in vars(Child) and loaded.loaded == (7, 3)


def test_arguments_can_be_given_anew(tmp_path):
    path = save(pruned(), tmp_path / "small.ckpt")
    assert load_pruned(Lit, path, scale=2.0).hparams.scale == 2.0
    with pytest.raises(
        ValueError, match=r"body.0.weight has the shape \(16, 8\), but got Lit with \(20, 8\)"
    ):
        load_pruned(Lit, path, width=20)


def test_a_dense_checkpoint_loads_as_ever(tmp_path):
    dense = Lit()
    loaded = load_pruned(Lit, save(dense, tmp_path / "dense.ckpt"))
    assert_same(loaded, dense)
    assert KEY not in torch.load(tmp_path / "dense.ckpt", weights_only=True)


def test_it_is_for_lightning_modules():
    with pytest.raises(ValueError, match="`cls` is a LightningModule"):
        load_pruned(nn.Linear, "any.ckpt")


@pytest.mark.parametrize("stage", ["validate", "test", "predict", "fit"])
def test_the_trainer_loads_it_where_the_module_replays_its_record(tmp_path, stage):
    path = save(pruned(Replaying), tmp_path / "small.ckpt")
    fresh = Replaying()
    fresh.test_step = fresh.validation_step
    run = getattr(trainer(max_epochs=2), stage)
    others = {"val_dataloaders": data()} if stage == "fit" else {}
    run(fresh, data(), ckpt_path=path, weights_only=True, **others)
    assert fresh.body[0].out_features == 3 and len(plans_of(fresh)) == 2


def test_what_was_loaded_is_saved_again_and_pruned_on(tmp_path):
    loaded = load_pruned(Lit, save(pruned(times=1), tmp_path / "once.ckpt"))
    execute_(loaded, plan_of(loaded, (0, 3, 4)))
    again = load_pruned(Lit, save(loaded, tmp_path / "twice.ckpt"))
    assert_same(again, loaded)
    assert len(plans_of(again)) == 2


def test_a_copy_and_a_pickle_keep_the_record():
    small = pruned()
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        checkpoint = {}
        twin.on_save_checkpoint(checkpoint)
        assert checkpoint["mine"] == 7 and read_record(checkpoint) == plans_of(small) == plans_of(twin)
        execute_(twin, plan_of(twin, (0, 1)))
        checkpoint = {}
        small.on_save_checkpoint(checkpoint)
        assert len(read_record(checkpoint)) == 2 and len(plans_of(twin)) == 3


def checkpoint_of(module):
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_only_what_is_missing_is_replayed():
    checkpoint = checkpoint_of(pruned())
    module = pruned(times=1)
    shrink_to_(module, checkpoint)
    assert module.body[0].out_features == 3 and len(plans_of(module)) == 2
    shrink_to_(module, checkpoint)
    assert len(plans_of(module)) == 2


# refusals, which leave the model alone


def assert_refused(module, checkpoint, message):
    before, plans = copy.deepcopy(module.state_dict()), plans_of(module)
    with pytest.raises(ValueError, match=message):
        shrink_to_(module, checkpoint)
    after = module.state_dict()
    assert plans_of(module) == plans
    assert all(torch.equal(before[n], after[n]) for n in {**before, **after})
    assert module.body[0].out_features == len(module.body[0].weight)


def test_another_model_is_refused():
    assert_refused(Lit(width=17), checkpoint_of(pruned()), r"shape \(16, 8\), but got Lit with \(17, 8\)")


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("fault", ["a layer more", "a dense weight", "no weights"])
@pytest.mark.parametrize("cls", [Lit, Replaying])
def test_weights_that_do_not_fit_leave_the_module_as_it_was(cls, stage, fault, tmp_path):
    class Grown(cls):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(4, 4) if fault == "a layer more" else None

    checkpoint = torch.load(save(pruned(), tmp_path / "small.ckpt"), weights_only=True)
    if fault == "a dense weight":
        checkpoint["state_dict"]["body.4.weight"] = torch.zeros(8, 16)
    elif fault == "no weights":
        del checkpoint["state_dict"]
    torch.save(checkpoint, tmp_path / "small.ckpt")
    module = Grown()
    before = copy.deepcopy(module.state_dict())
    callback = TrainTimePruning(0.5, granularity=Channel(), report=False)
    run = trainer(*([callback] if cls is Lit else []), max_epochs=1)
    loaders = [data(), data()][: 2 if stage == "fit" else 1]
    with pytest.raises(ValueError, match="`ckpt_path` is a checkpoint whose weights fit"):
        getattr(run, stage)(module, *loaders, ckpt_path=tmp_path / "small.ckpt", weights_only=True)
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], t) for n, t in after.items())
    assert plans_of(module) == () and module.body[0].out_features == 16


def test_a_later_plan_that_does_not_fit_undoes_the_earlier():
    small = pruned(times=1)
    plans = [*plans_of(small), plan_of(Lit(), (0, 1))]
    module = Lit()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"body.0.weight has the shape \(16, 8\), but got Lit with \(7, 8\)"):
        replay_(module, plans)
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
    assert plans_of(module) == () and "on_save_checkpoint" not in vars(module)
    assert module.body[0].out_features == 16


def test_a_newer_version_is_refused():
    checkpoint = checkpoint_of(pruned())
    checkpoint[KEY] = {**checkpoint[KEY], "version": VERSION + 1}
    assert_refused(Lit(), checkpoint, "a newer lightning_prune wrote it")


def test_a_damaged_record_is_refused():
    checkpoint = checkpoint_of(pruned())
    checkpoint[KEY]["plans"][0]["slices"]["body.0.weight"][0][1] = "ffff"
    assert_refused(Lit(), checkpoint, "changed or truncated")
    del checkpoint[KEY]["checksum"]
    assert_refused(Lit(), checkpoint, "truncated")


def test_a_dense_checkpoint_does_not_fit_a_small_model():
    assert_refused(
        pruned(), checkpoint_of(Lit()), "made smaller 2 times, and a checkpoint from when it had been 0"
    )
    assert_refused(pruned(), checkpoint_of(pruned(times=1)), "when it had been 1 times: build a new Lit")


def test_a_model_that_was_pruned_differently_is_refused():
    other = Lit()
    execute_(other, plan_of(other, (0, 1, 2)))
    assert_refused(other, checkpoint_of(pruned()), "pruned differently: slices of body.0.weight")


def test_weights_that_fit_need_no_record():
    """Plain weights of the small model, saved without Lightning, go into a small model."""
    small = pruned()
    assert shrink_to_(small, {"state_dict": small.state_dict()}) == []
    assert small.body[0].out_features == 3


def test_all_of_it_loads_safely(tmp_path):
    path = tmp_path / "plain.pt"
    torch.save({KEY: to_data(plans_of(pruned()))}, path)
    assert read_record(torch.load(path, weights_only=True)) == plans_of(pruned())
    assert isinstance(pruned(), L.LightningModule)


def test_weights_alone_are_no_checkpoint(tmp_path):
    torch.save(Toy().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"`path` is a checkpoint that a Trainer has saved, but got .*weights\.pt"
    ):
        load_pruned(Toy, tmp_path / "weights.pt")
