"""Two callbacks on one model: they train to the end and resume bit for bit, or are refused before the first step."""

from itertools import product

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import (
    Channel,
    Constant,
    InitialPruning,
    NofM,
    PostTrainingPruning,
    SparseTraining,
    StraightThrough,
    TrainTimePruning,
    WeightRewinding,
    Window,
)
from lightning_prune.model.history import plans_of
from lightning_prune.model.surgery import sliced
from lightning_prune.report.storage import load
from tests.callbacks.toy import NUM_BATCHES, Toy, Witness, data, pruned_weights, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
COUPLED = {"granularity": Channel(multiple_of=1)}
RAMP = {"window": Window(every=0.1, end=0.6), "compact": False}
MAKE = {
    "train_time": lambda **own: TrainTimePruning(0.5, **RAMP, **own),
    "train_time/end": lambda **own: TrainTimePruning(0.5, **RAMP, **COUPLED, **own),
    "train_time/update": lambda **own: TrainTimePruning(0.5, **RAMP, **COUPLED, shrink="update", **own),
    "train_time/never": lambda **own: TrainTimePruning(0.5, **RAMP, **COUPLED, shrink="never", **own),
    "sparse": lambda **own: SparseTraining(0.5, **own),
    "initial": lambda **own: InitialPruning(0.5, **own),
    "initial/end": lambda **own: InitialPruning(0.5, **COUPLED, **own),
    "initial/never": lambda **own: InitialPruning(0.5, **COUPLED, shrink="never", **own),
    "rewinding": lambda **own: WeightRewinding(0.5, num_levels=1, **own),
    "post": lambda **own: PostTrainingPruning(0.5, **own),
    "post/end": lambda **own: PostTrainingPruning(0.5, **COUPLED, **own),
}
HOLD = [name for name in MAKE if not name.startswith("post") and name != "initial/end"]
SHRINK = ["train_time/end", "train_time/update"]
OF_WEIGHTS = [name for name in HOLD if "/" not in name]
QUICK = (
    ("train_time/end", "train_time/update"),
    ("initial/end", "train_time"),
    ("post/end", "train_time"),
    ("rewinding", "train_time/end"),
    ("sparse", "train_time/update"),
)
PAIRS = [
    pytest.param(pair, marks=() if pair in QUICK else pytest.mark.slow)
    for pair in product(MAKE, MAKE)
    if pair[0] <= pair[1]
]


class Deep(Toy):
    """Two parts, each with a group of channels of its own."""

    def __init__(self) -> None:
        super().__init__("SGD", lr=0.1, momentum=0.9)
        self.body = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
        )


def is_refused(first, second, are_apart):
    """Whether two cannot be had: of the same weights, where one goes back to a larger model, or both lengthen fits."""
    pair = {first, second}
    if "rewinding" in pair and (pair & {*SHRINK} or len(pair) == 1):
        return True
    hold = first in HOLD and second in HOLD
    return not are_apart and (hold or ("post/end" in pair and bool(pair & {*OF_WEIGHTS})))


def build(names, are_apart, **own):
    """The callbacks of two names, for parts of their own or for all."""
    parts = (["body.0"], ["body.3"]) if are_apart else (["body.*", "head"], ["body*", "head"])
    return [MAKE[name](include=part, report=False, **own) for name, part in zip(names, parts, strict=True)]


class Steps(Callback):
    """Counts the batches that were trained on."""

    num = 0

    def on_train_batch_end(self, *_):
        self.num += 1


def run(callbacks, folder=None, **options):
    module = Deep()
    if folder is not None:
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [*callbacks, saving]
    fit = trainer(*callbacks, max_epochs=2)
    torch.manual_seed(7)
    fit.fit(module, data(shuffle=True), data(), weights_only=True, **options)
    return module


def everything(module, callbacks):
    found = dict(module.state_dict())
    for i, callback in enumerate(callbacks):
        found |= {f"{i}.{name}": mask for name, mask in callback.masks.items()}
        achieved = [callback.pruner.sparsity, *(update["achieved"] for update in callback.updates)]
        found[f"{i}"] = torch.tensor(achieved, dtype=torch.float64)
    return found


def assert_pruned(module, callbacks):
    for callback in callbacks:
        assert callback.updates[-1]["achieved"] == pytest.approx(0.5, abs=0.01)
        assert callback.pruner.sparsity >= 0.49
        assert not any(bool(weight.any()) for weight in pruned_weights(module, callback))
        for name, mask in callback.masks.items():
            assert mask.shape == module.get_parameter(name).shape


@pytest.mark.parametrize("are_apart", [True, False], ids=["apart", "together"])
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_callbacks_train_to_the_end_or_are_refused_before_the_first_step(names, are_apart, tmp_path):
    callbacks = build(names, are_apart)
    if is_refused(*names, are_apart):
        kinds = [type(callback).__name__ for callback in callbacks]
        for order in (1, -1):
            with pytest.raises(ValueError, match="`callbacks`") as error:
                run([steps := Steps(), *build(names, are_apart)[::order]])
            assert steps.num == 0 and all(kind in str(error.value) for kind in kinds)
        return
    module = run(callbacks, tmp_path)
    assert_pruned(module, callbacks)
    expected = everything(module, callbacks)
    num_steps = NUM_BATCHES * (4 if "rewinding" in names else 2)
    order = 1 if names[0] == names[1] else -1
    for step in (1, 7, num_steps - 1):
        again = build(names, are_apart)
        resumed = run(again[::order], ckpt_path=tmp_path / f"step={step}.ckpt")
        found = everything(resumed, again)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        assert [p.slices for p in plans_of(resumed)] == [p.slices for p in plans_of(module)]


def test_a_checkpoint_of_masks_of_the_larger_model_is_refused(tmp_path):
    run([TrainTimePruning(0.5, **RAMP, report=False)], tmp_path)
    pair = [TrainTimePruning(0.5, **RAMP, report=False), InitialPruning(0.5, **COUPLED, report=False)]
    with pytest.raises(ValueError, match=r"TrainTimePruning.*InitialPruning.*masks that a checkpoint holds"):
        run(pair, ckpt_path=tmp_path / "step=9.ckpt")


def test_a_scope_that_the_smaller_model_does_not_fit_is_refused_before_the_first_step():
    weights = TrainTimePruning(scope=NofM(2, 4), include=["body.2"], report=False)
    channels = InitialPruning(0.4, **COUPLED, include=["body.0"], report=False)
    with pytest.raises(ValueError, match=r"body\.2\.weight"):
        run([steps := Steps(), weights, channels])
    assert steps.num == 0


@pytest.mark.parametrize("name", [*OF_WEIGHTS, "soft"])
def test_masks_follow_a_pruning_after_the_fit(name, tmp_path):
    """What a fit with both is answered with: one after the other."""
    soft = {"masking": StraightThrough()} if name == "soft" else {}
    first = MAKE["train_time" if soft else name](report=False, **soft)
    module, fit = Deep(), trainer(first, max_epochs=2, default_root_dir=tmp_path)
    fit.fit(module, data(), data())
    module.train_dataloader = module.val_dataloader = data
    before = dict(first.masks)
    PostTrainingPruning(0.5, **COUPLED, report=False).run(fit, module)
    (plan,) = plans_of(module)
    for name, mask in before.items():
        assert torch.equal(first.masks[name], sliced(mask, plan.slices.get(name, {})))
    assert not any(bool(weight.any()) for weight in pruned_weights(module, first))
    trainer(first, max_epochs=1).fit(module, data(), data())
    assert not any(bool(weight.any()) for weight in pruned_weights(module, first))


@pytest.mark.parametrize("shrink", ["end", "update"])
def test_two_that_shrink_cut_what_they_would_cut_alone(shrink, tmp_path):
    """With a dense start and plain SGD, the first update of each sees the same weights as without the other."""
    own = {"window": Window(end=0.0), "schedule": Constant(), "shrink": shrink, "report": False, **COUPLED}
    parts = (["body.0"], ["body.3"])
    both = run([TrainTimePruning(0.5, include=part, **own) for part in parts])
    for part, plan in zip(parts, plans_of(both), strict=True):
        alone = run([TrainTimePruning(0.5, include=part, **own)])
        assert plans_of(alone)[0].slices == plan.slices


def test_a_report_is_written_of_both(tmp_path):
    first = TrainTimePruning(0.5, **RAMP, **COUPLED, include=["body.0"])
    second = TrainTimePruning(0.5, **RAMP, **COUPLED, include=["body.3"])
    fit = trainer(first, second, max_epochs=2, default_root_dir=tmp_path)
    fit.fit(Deep(), data(), data())
    report = load(tmp_path / "report.json")
    assert report.achieved_sparsity == report.target_sparsity == 0.5
    assert {group.name: (group.size, group.kept) for group in report.groups} == {
        "body.0.weight": (16, 8),
        "body.3.weight": (16, 8),
    }


def test_weights_of_the_best_checkpoint_are_masked(tmp_path):
    """The best may be one from before the last update."""
    first = TrainTimePruning(0.5, **RAMP, include=["body.0"], report=False)
    last = PostTrainingPruning(0.5, include=["body.3"], checkpoint="best", report=False)
    best = ModelCheckpoint(tmp_path, monitor="val/loss", mode="max", save_top_k=1)
    module = Deep()
    trainer(last, first, best, max_epochs=3).fit(module, data(), data())
    assert_pruned(module, [first, last])


def test_a_best_checkpoint_of_a_larger_model_is_refused(tmp_path):
    first = TrainTimePruning(0.5, **RAMP, **COUPLED, report=False)
    last = PostTrainingPruning(0.5, checkpoint="best", report=False)
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.raises(ValueError, match=r"PostTrainingPruning.*best checkpoint.*TrainTimePruning"):
        trainer(first, last, best).fit(Deep(), data(), data())


@pytest.mark.parametrize("order", [1, -1])
def test_masks_hold_after_weights_were_rewound(order):
    weights = TrainTimePruning(0.5, **RAMP, include=["body.0"], report=False)
    witness = Witness(weights)
    pair = [weights, WeightRewinding(0.5, num_levels=1, include=["body.3"], report=False)]
    run([*pair[::order], witness])
    assert witness.reads > 0 and witness.violations == 0


def test_weights_that_read_what_another_takes_out_are_told():
    channels = TrainTimePruning(0.5, granularity=Channel(multiple_of=1), include=["body"], report=False)
    weights = TrainTimePruning(0.5, include=["head"], report=False)
    with pytest.raises(
        ValueError, match=r"for head.weight: .*`head.weight` reads `body.4.weight`: leave out what is"
    ):
        trainer(weights, channels).fit(Toy(), data(), data())
    channels = TrainTimePruning(0.5, granularity=Channel(multiple_of=1), include=["body.0"], report=False)
    trainer(weights, channels).fit(module := Toy(), data(), data())
    assert module.body[0].out_features == 8 and float((module.head.weight == 0).float().mean()) == 0.5
