"""N steps = k steps, kill, resume, N - k steps: tensor for tensor, for every kind of recipe."""

import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_prune import (
    ERK,
    LAMP,
    Alternating,
    APoZ,
    Block,
    Constant,
    ConstantFanIn,
    Cosine,
    Dormant,
    Fisher,
    Global,
    Local,
    MeanGradient,
    Movement,
    NofM,
    PerRow,
    Polynomial,
    PostTrainingPruning,
    Random,
    Saliency,
    Slice,
    SparseTraining,
    Steps,
    StraightThrough,
    TrainTimePruning,
    Wanda,
    Window,
)
from lightning_prune.core.masks import unpack
from lightning_prune.examples.loading import as_sliced
from tests.callbacks.toy import GAN, NUM_BATCHES, Toy, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]
RECIPES = {
    "defaults": {},
    "movement": {"criterion": Movement()},
    "saliency": {"criterion": Saliency(), "scope": Local()},
    "fisher": {"criterion": Fisher()},
    "wanda": {"criterion": Wanda(), "scope": PerRow()},
    "apoz": {"criterion": APoZ(), "granularity": Slice(dim=0), "include": ["body"]},
    "random": {"criterion": Random(seed=5), "schedule": Cosine()},
    "n-of-m": {"sparsity": None, "scope": NofM()},
    "erk": {"scope": ERK(), "schedule": Steps(num_steps=4)},
    "lamp": {"scope": LAMP(), "granularity": Block(2, 2)},
    "alternating": {"schedule": Alternating(num_phases=4)},
    "one-shot": {"schedule": Constant(), "window": Window(end=0.0)},
    "by-pattern": {"sparsity": {"head": 0.25, "*": 0.8}},
    "rigl": {"callback": SparseTraining},
    "set": {"callback": SparseTraining, "grow": Random(seed=3), "decay": None},
    "rigl-mean": {"callback": SparseTraining, "grow": MeanGradient()},
    "granet": {"callback": SparseTraining, "schedule": Polynomial(), "scope": Global()},
    "srigl": {"callback": SparseTraining, "scope": ConstantFanIn()},
    "ste": {"masking": StraightThrough(), "schedule": Constant(), "window": Window(every=1e-9)},
    "sr-ste": {"masking": StraightThrough(0.01), "sparsity": None, "scope": NofM()},
    "soft-movement": {"masking": Dormant(), "criterion": Movement()},
    "soft-ac-dc": {"masking": StraightThrough(), "schedule": Alternating(num_phases=4)},
}
LAST = 4 * NUM_BATCHES


def build(recipe):
    settings = {"sparsity": 0.8, "window": Window(every=0.1), "report": False, **RECIPES[recipe]}
    return settings.pop("callback", TrainTimePruning)(**settings)


class DyingCheckpoint(ModelCheckpoint):
    """Saves after each step, and ends the process without a word once that of `kill_at` is on disk."""

    def __init__(self, folder, kill_at=None):
        super().__init__(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        self.kill_at = kill_at

    def on_train_batch_end(self, trainer, *args, **kwargs):
        super().on_train_batch_end(trainer, *args, **kwargs)
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(recipe, folder, *others, module=Toy, kill_at=None, ckpt_path=None, **options):
    callback = build(recipe)
    fit = trainer(callback, *others, DyingCheckpoint(folder, kill_at), **options)
    trained = module()
    torch.manual_seed(7)
    fit.fit(trained, data(shuffle=True), data() if isinstance(trained, Toy) else None, ckpt_path=ckpt_path)
    return fit, trained, callback


def in_a_process_that_dies(function):
    """Fork, run, and wait for the kill: a real process with real files, without the cost of importing torch."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)  # it should never come to this
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def everything(fit, module, callback):
    """All that a run has become: weights, buffers, optimizers, masks, steps, random state."""
    found = {f"module.{k}": v for k, v in module.state_dict().items()}
    for i, optimizer in enumerate(fit.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{j}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
    found |= {f"mask.{k}": v for k, v in callback.masks.items()}
    found |= {f"movement.{k}": v for k, v in callback.pruner.statistics.state_dict().items()}
    found |= {f"behind.{k}": v for k, v in getattr(callback.pruner, "behind", {}).items()}
    found["requested"] = torch.tensor([u["requested"] for u in callback.updates], dtype=torch.float64)
    found["achieved"] = torch.tensor([u["achieved"] for u in callback.updates], dtype=torch.float64)
    found["steps"] = torch.tensor([u["step"] for u in callback.updates] + [callback.ramp.num_steps])
    return found


def assert_equal(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without interruption, once for each recipe."""
    done = {}

    def get(recipe, *others, **options):
        key = recipe, str(options)
        if key not in done:
            done[key] = everything(
                *run(recipe, tmp_path_factory.mktemp("whole"), *(build() for build in others), **options)
            )
        return done[key]

    return get


@pytest.mark.parametrize("kill_at", [1, 9, 12, 16, 23])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_goes_on_bit_for_bit(recipe, kill_at, whole, tmp_path):
    """Early in the ramp, in its middle (within an epoch and at the end of one), where it ends and after it."""
    in_a_process_that_dies(lambda: run(recipe, tmp_path, kill_at=kill_at))
    last = tmp_path / f"step={kill_at}.ckpt"
    assert last.exists() and not (tmp_path / f"step={kill_at + 1}.ckpt").exists()
    resumed = everything(*run(recipe, tmp_path, ckpt_path=last))
    assert resumed["steps"][-1] == LAST
    assert_equal(whole(recipe), resumed)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 4},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.5},
        {"module": GAN},
        {"module": lambda: Toy("SGD", momentum=0.9)},
    ],
    ids=["accumulate", "bf16", "gan", "sgd"],
)
def test_under_other_ways_to_train(options, whole, tmp_path):
    expected = whole("defaults", **options)
    run("defaults", tmp_path, **options)
    middle = sorted(tmp_path.glob("*.ckpt"), key=lambda f: int(f.stem.split("=")[1].split("-")[0]))[2]
    assert_equal(expected, everything(*run("defaults", tmp_path, ckpt_path=middle, **options)))


def test_with_an_average_of_the_weights(whole, tmp_path):
    average = lambda: EMAWeightAveraging(decay=0.9)  # noqa: E731
    expected = whole("movement", average, max_epochs=4)
    run("movement", tmp_path, average(), max_epochs=4)
    assert_equal(
        expected,
        everything(*run("movement", tmp_path, average(), max_epochs=4, ckpt_path=tmp_path / "step=9.ckpt")),
    )


def test_between_epochs_with_a_shuffling_loader(tmp_path):
    """What most people do: DataLoader(shuffle=True) and a checkpoint after each epoch."""

    def fit(ckpt_path=None):
        callback = build("defaults")
        run = trainer(
            callback,
            ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        )
        module = Toy()
        torch.manual_seed(7)
        run.fit(
            module,
            DataLoader(data().dataset, batch_size=8, shuffle=True, collate_fn=as_sliced),
            data(),
            ckpt_path=ckpt_path,
        )
        return everything(run, module, callback)

    expected = fit()
    assert_equal(expected, fit(tmp_path / "epoch=1.ckpt"))


def test_checkpoints_hold_plain_masked_weights_and_packed_masks(tmp_path):
    run("defaults", tmp_path)
    checkpoint = torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    masks = checkpoint["callbacks"]["TrainTimePruning"]["pruner"]["masks"]
    assert set(masks) == {"body.0.weight", "body.4.weight", "head.weight"}
    for name, packed in masks.items():
        weight, mask = checkpoint["state_dict"][name], unpack(name, packed)
        assert bool((weight[~mask] == 0).all()) and int((~mask).sum()) > 0
        assert packed["bits"].numel() == -(-weight.numel() // 8)
    bare = Toy()
    bare.load_state_dict(checkpoint["state_dict"], strict=True)


def test_a_dense_checkpoint_can_be_pruned_on_from(tmp_path):
    dense = trainer(ModelCheckpoint(tmp_path, filename="dense"), max_epochs=2)
    dense.fit(Toy(), data(), data())
    callback, module = build("defaults"), Toy()
    trainer(callback).fit(module, data(), data(), ckpt_path=tmp_path / "dense.ckpt")
    assert callback.ramp.is_over and sum(int((w == 0).sum()) for w in module.parameters()) > 100
    first = callback.updates[0]
    assert (first["step"], first["requested"]) == (12, 0.0)  # it ramps up from where the run is
    late = TrainTimePruning(0.8, window=Window(end=0.4), report=False)
    with pytest.raises(ValueError, match="an end at optimizer step 10 of a run that has done 12"):
        trainer(late).fit(Toy(), data(), data(), ckpt_path=tmp_path / "dense.ckpt")


def test_a_dense_run_that_ended_within_an_epoch_is_counted_to_the_step(tmp_path):
    trainer(DyingCheckpoint(tmp_path), max_epochs=2).fit(Toy(), data(shuffle=True), data())
    callback = build("defaults")
    fit = trainer(callback)
    fit.fit(Toy(), data(shuffle=True), data(), ckpt_path=tmp_path / "step=7.ckpt")
    assert callback.updates[0]["step"] == 7 and callback.ramp.num_steps == fit.global_step == LAST


def test_a_changed_recipe_is_told_and_then_followed(tmp_path):
    run("defaults", tmp_path)
    callback = TrainTimePruning(0.9, window=Window(every=0.1), report=False)
    with pytest.warns(
        UserWarning, match=r"`sparsity` was 0.8 in the run that is resumed, and is 0.9 from now on"
    ):
        trainer(callback).fit(Toy(), data(shuffle=True), data(), ckpt_path=tmp_path / "step=9.ckpt")
    assert callback.updates[-1]["requested"] == 0.9


def test_masks_that_would_be_forgotten_are_refused(tmp_path):
    run("defaults", tmp_path)
    callback = TrainTimePruning(0.8, exclude=["head"], report=False)
    with pytest.raises(
        ValueError, match=r"`include` and `exclude` are those of the run .*\['TrainTimePruning'\], but got"
    ):
        trainer(callback).fit(Toy(), data(), data(), ckpt_path=tmp_path / "step=9.ckpt")


def test_state_of_a_newer_version_is_refused():
    with pytest.raises(ValueError, match=r"at most 1, but got 99: a newer lightning_prune wrote it"):
        build("defaults").load_state_dict({"version": 99})


def test_post_training_state_survives(tmp_path):
    callback = PostTrainingPruning(0.5, report=False)
    fit = trainer(callback, ModelCheckpoint(tmp_path))
    fit.fit(Toy(), data(), data())
    state = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["callbacks"]["PostTrainingPruning"]
    assert set(state["pruner"]["masks"]) == set(callback.masks) and state["updates"][0][
        "achieved"
    ] == pytest.approx(0.5, abs=0.01)
