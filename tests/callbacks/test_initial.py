"""Pruning before training: on the toy with the module's own step, held through training, resumed, in two processes."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_prune import (
    OBD,
    BatchNormScale,
    Channel,
    Fisher,
    GraSP,
    InitialPruning,
    Layer,
    Magnitude,
    Movement,
    NofM,
    Saliency,
    Slice,
    SynFlow,
    TrainTimePruning,
)
from lightning_prune.examples.loading import as_sliced
from tests.callbacks.toy import GAN, NUM_BATCHES, Toy, Witness, data, pruned_weights, trainer

RECIPES = {
    "snip": {},
    "grasp": {"criterion": GraSP()},
    "synflow": {"criterion": SynFlow(), "num_rounds": 20},
    "force": {"num_rounds": 5, "revive": True},
    "fisher": {"criterion": Fisher(), "granularity": Slice(dim=0), "include": ["body"]},
    "obd": {"criterion": OBD()},
    "n-of-m": {"sparsity": None, "scope": NofM()},
    "slimming": {"criterion": BatchNormScale(), "granularity": Slice(dim=0), "include": ["body.0"]},
}

SMALLER = {"granularity": Channel(multiple_of=1), "sparsity": 0.5}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def build(recipe="snip", **options):
    return InitialPruning(**{"sparsity": 0.8, "report": False, **RECIPES.get(recipe, {}), **options})


def fit(callback, *others, module=None, ckpt_path=None, **options):
    run, trained = trainer(callback, *others, **options), module or Toy()
    torch.manual_seed(7)
    run.fit(trained, data(shuffle=True), data() if isinstance(trained, Toy) else None, ckpt_path=ckpt_path)
    return run, trained


class Batches(L.Callback):
    """Notes what training is given, and the random numbers that are drawn then."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen += [batch[0].clone(), torch.get_rng_state()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_are_there_before_the_first_step_and_hold(recipe):
    callback = build(recipe)
    witness = Witness(callback)
    _, module = fit(callback, witness, max_epochs=1)
    assert witness.reads > 0 == witness.violations
    assert all(not w.count_nonzero() for w in pruned_weights(module, callback))
    (update,) = callback.updates
    assert (update["step"], update["progress"]) == (0, 1.0) and callback.ramp.is_over
    if recipe not in ("n-of-m", "fisher", "slimming"):
        assert update["achieved"] == pytest.approx(0.8, abs=0.01)


def test_snip_is_the_saliency_of_the_first_batches_of_training():
    """In training mode but for dropout, in which the toy's batch norm normalises by the batch."""
    callback, seen = build(num_calibration_batches=2), Batches()
    fit(callback, seen, max_epochs=1)
    model = Toy()
    model.body[3].p = 0.0
    expected = []
    for inputs in seen.seen[0:4:2]:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets_of(inputs)).backward()
        expected.append([m.weight.grad.clone() for m in (model.body[0], model.body[4], model.head)])
    means = [torch.stack(grads).mean(0) for grads in zip(*expected, strict=True)]
    weights = [m.weight.detach() for m in (model.body[0], model.body[4], model.head)]
    scores = torch.cat([(g * w).abs().flatten() for g, w in zip(means, weights, strict=True)])
    kept = torch.cat([m.flatten() for m in callback.masks.values()])
    assert float(scores[kept].min()) >= float(scores[~kept].max())


def targets_of(inputs):
    pairs = data().dataset
    index = [int((pairs.inputs == row).all(1).nonzero()) for row in inputs]
    return pairs.targets[index]


@pytest.mark.parametrize("recipe", ["snip", "synflow", "grasp"])
def test_training_goes_on_as_it_would_without(recipe):
    """The same batches in the same order, the same random states, and running statistics that start where they did."""
    with_it, without = Batches(), Batches()
    _, module = fit(build(recipe, sparsity=0.0), with_it, max_epochs=2)
    _, plain = fit(build(recipe="none", sparsity=0.0, criterion=Magnitude()), without, max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(with_it.seen, without.seen, strict=True))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in module.state_dict().items())
    shuffling = Batches(), Batches()
    for seen, callbacks in zip(shuffling, ([build(recipe)], []), strict=True):
        torch.manual_seed(3)
        loader = DataLoader(data().dataset, batch_size=8, shuffle=True, collate_fn=as_sliced)
        trainer(*callbacks, seen, max_epochs=1).fit(Toy(), loader)
    assert all(torch.equal(a, b) for a, b in zip(*(s.seen[0:12:2] for s in shuffling), strict=True))


def everything(run, module, callback):
    found = dict(module.state_dict()) | {f"mask.{k}": v for k, v in callback.masks.items()}
    for i, state in run.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    return found | {"steps": torch.tensor(callback.ramp.num_steps)}


@pytest.mark.parametrize("options", [*RECIPES.values(), SMALLER], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit_without_pruning_again(options, tmp_path):
    callback = build(**options)
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = everything(*fit(callback, every, max_epochs=2), callback)
    saved = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Toy().state_dict().keys()
    for step in (1, NUM_BATCHES, 8):
        again = build(**options)
        resumed = everything(*fit(again, max_epochs=2, ckpt_path=tmp_path / f"step={step}.ckpt"), again)
        assert whole.keys() == resumed.keys() and again.updates == callback.updates
        assert [k for k, v in whole.items() if not torch.equal(v, resumed[k])] == []


@pytest.mark.parametrize("criterion", [Saliency(), GraSP(), SynFlow(), Magnitude()], ids=str)
def test_channels_are_taken_out_before_training(criterion):
    callback = build(sparsity=0.5, criterion=criterion, granularity=Channel(multiple_of=1))
    run, module = fit(callback, max_epochs=1)
    assert module.body[0].out_features + module.body[4].out_features == 12
    for parameter, state in run.optimizers[0].state.items():
        assert state["exp_avg"].shape == parameter.shape
    held = build(sparsity=0.5, criterion=criterion, granularity=Channel(multiple_of=1), shrink="never")
    _, module = fit(held, max_epochs=1)
    assert module.body[0].out_features == 16
    assert all(not w.count_nonzero() for w in pruned_weights(module, held))


def test_a_run_from_a_dense_checkpoint_is_pruned_where_it_starts(tmp_path):
    dense = trainer(ModelCheckpoint(tmp_path, filename="dense", every_n_train_steps=8), max_epochs=2)
    dense.fit(Toy(), data(), data())
    callback, seen, without = build(), Batches(), Batches()
    fit(callback, seen, max_epochs=3, ckpt_path=tmp_path / "dense.ckpt")
    trainer(without, max_epochs=3).fit(Toy(), data(shuffle=True), ckpt_path=tmp_path / "dense.ckpt")
    (update,) = callback.updates
    assert update["step"] == 7  # Lightning writes a checkpoint before it counts the step
    assert len(seen.seen) == len(without.seen)
    assert all(torch.equal(a, b) for a, b in zip(seen.seen[::2], without.seen[::2], strict=True))


def test_the_report_says_what_was_done(tmp_path):
    callback = InitialPruning(0.8, num_rounds=3)
    fit(callback, max_epochs=1, default_root_dir=tmp_path)
    assert (tmp_path / "report.md").exists() and "before training" in (tmp_path / "report.md").read_text()
    assert callback.describe()["num_rounds"] == "3" and "window" not in callback.describe()


class Several(Toy):
    """Two loaders at once, and batches that a hook changes before they are moved."""

    def train_dataloader(self):
        return {"first": data(), "second": data()}

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch["first"] if isinstance(batch, dict) else batch


def test_several_loaders_and_hooks_on_batches():
    callback, module = build(), Several()
    trainer(callback, max_epochs=1).fit(module)
    plain = build()
    trainer(plain, max_epochs=1).fit(Toy(), data())
    assert all(torch.equal(m, plain.masks[n]) for n, m in callback.masks.items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision):
    callback = build("grasp")
    _, module = fit(callback, max_epochs=1, precision=precision)
    assert all(not w.count_nonzero() for w in pruned_weights(module, callback))


def test_a_magnitude_needs_no_loss_and_takes_several_optimizers():
    callback = build(criterion=Magnitude())
    _, module = fit(callback, module=GAN(), max_epochs=1)
    assert all(not w.count_nonzero() for w in pruned_weights(module, callback)) and len(callback.masks) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity` is a sparsity"),
        ({"criterion": Movement()}, r"got Movement\(\), a sum over training: use TrainTimePruning"),
        (
            {"num_calibration_batches": 0},
            r"`num_calibration_batches` is a whole number of at least 1, but got 0",
        ),
        ({"num_rounds": 0}, r"`num_rounds` is a whole number of at least 1, but got 0"),
        ({"revive": True}, r"`revive` lets weights come back in later rounds"),
        (
            {"granularity": Channel(), "shrink": "update"},
            r"`shrink` is one of \['end', 'never'\], but got 'update'",
        ),
        ({"granularity": Layer()}, r"`granularity` Layer takes out whole blocks"),
    ],
)
def test_bad_settings_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_what_needs_a_loss_is_refused_with_manual_optimization():
    with pytest.raises(ValueError, match="asks for gradients, which need automatic optimization"):
        fit(build(), module=GAN(), max_epochs=1)


def test_training_refuses_what_only_batches_show():
    with pytest.raises(ValueError, match=r"got GraSP\(\), which takes passes of its own"):
        TrainTimePruning(0.5, criterion=GraSP())
