"""The guard: a dying layer is named and keeps what it has, the others make up for it, and all of it is resumed."""

from itertools import pairwise

import pytest
import torch

from lightning_prune import (
    Channel,
    CollapseGuard,
    Constant,
    Global,
    InitialPruning,
    Linear,
    Local,
    NofM,
    SparseTraining,
    StraightThrough,
    TrainTimePruning,
    WeightRewinding,
    Window,
)
from lightning_prune.callbacks import in_training
from lightning_prune.model import reach
from tests.callbacks.test_resume import DyingCheckpoint, assert_equal, everything, in_a_process_that_dies
from tests.callbacks.toy import Toy, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:.*is protected from now on"),
]
THIN = "body.4.weight"


class Thin(Toy):
    """One layer's weights are so small that a global ranking takes all of them."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.get_parameter(THIN).mul_(1e-4)
        self.options = {"lr": 1e-5}


class Needy(Toy):
    """The validation metric collapses where one layer has lost more than half of its weights."""

    needed = "head.weight"

    def validation_step(self, batch, batch_idx):
        density = (self.get_parameter(self.needed) != 0).float().mean()
        self.log("val/acc", torch.where(density < 0.5, 0.1, 0.9))


def pruning(**options):
    settings = {"sparsity": 0.7, "schedule": Linear(), "window": Window(every=0.1), "report": False}
    return TrainTimePruning(**settings | options)


def growing(**options):
    """GraNet: pruned by magnitude along a ramp, and at each update weights move."""
    settings = {"sparsity": 0.7, "schedule": Linear(), "window": Window(every=0.1), "report": False}
    return SparseTraining(**settings | options)


BOTH = pytest.mark.parametrize("kind", [pruning, growing], ids=["pruned", "regrown"])


def fit(*callbacks, module=Needy, ckpt_path=None, **options):
    trained = module()
    torch.manual_seed(7)
    fitted = trainer(*callbacks, **options)
    fitted.fit(trained, data(shuffle=True), data(), ckpt_path=ckpt_path)
    return fitted, trained


def density(callback, name):
    return int(callback.masks[name].sum()) / callback.masks[name].numel()


def test_without_a_guard_the_thin_layer_dies():
    callback = pruning(scope=Global(min_keep=0))
    fit(callback, module=Thin)
    assert density(callback, THIN) == 0


@BOTH
def test_a_dying_layer_keeps_its_weights_is_named_and_the_others_make_up_for_it(kind):
    callback, guard = kind(scope=Global(min_keep=0)), CollapseGuard(0.05)
    said = rf"`{THIN}` is protected from now on.*would have left 0.00% of it; it keeps"
    with pytest.warns(UserWarning, match=said):
        _, trained = fit(callback, guard, module=Thin)
    assert guard.protected == [THIN] and density(callback, THIN) >= 0.05
    total = sum(mask.numel() for mask in callback.masks.values())
    assert sum(int(mask.sum()) for mask in callback.masks.values()) == total - round(0.7 * total)
    assert (trained.get_parameter(THIN) != 0).float().mean() == density(callback, THIN)
    assert guard._guard.held.keys() == {THIN} and torch.equal(guard._guard.held[THIN], callback.masks[THIN])


def test_the_weights_of_a_protected_layer_go_on_moving():
    class Looks(CollapseGuard):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            seen.extend(mask.clone() for name, mask in self._guard.held.items() if name == THIN)

    seen = []
    callback = growing(scope=Global(min_keep=0))
    with pytest.warns(UserWarning, match="is protected"):
        fit(callback, Looks(0.2), module=Thin)
    assert len({int(mask.sum()) for mask in seen}) == 1 and 0 < int(seen[0].sum()) < seen[0].numel()
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) > 1


def test_a_layer_that_would_die_at_once_stays_whole():
    callback, guard = pruning(sparsity=0.4, schedule=Constant(), scope=Global(min_keep=0)), CollapseGuard(0.2)
    with pytest.warns(UserWarning, match="keeps 100.00%"):
        fit(callback, guard, module=Thin)
    assert density(callback, THIN) == 1 and callback.pruner.sparsity == pytest.approx(0.4, abs=2e-3)


def test_where_every_layer_would_be_too_thin_none_is_pruned():
    callback, guard = pruning(schedule=Constant(), scope=Local()), CollapseGuard(0.5)
    with pytest.warns(UserWarning, match="is protected|could not be made up for"):
        fit(callback, guard, module=Toy)
    assert "sparsity is 0.0000, and was to be 0.7000" in callback.warnings[-1]
    assert sorted(guard.protected) == sorted(callback.masks) and callback.pruner.sparsity == 0


@BOTH
def test_a_collapse_is_rolled_back_and_its_layer_protected(kind):
    callback, guard = kind(scope=Local()), CollapseGuard(monitor="val/acc", tolerance=0.2)
    with pytest.warns(UserWarning, match=r"`val/acc` went from 0.9 to 0.1, and it had lost most"):
        fitted, _ = fit(callback, guard)
    assert "head.weight" in guard.protected and density(callback, "head.weight") >= 0.5
    assert float(fitted.callback_metrics["val/acc"]) == pytest.approx(0.9)
    achieved = [update["achieved"] for update in callback.updates]
    assert any(later < earlier for earlier, later in pairwise(achieved))
    assert [update["requested"] for update in callback.updates][-1] == pytest.approx(0.7)


@BOTH
def test_what_was_removed_comes_back_bit_for_bit(kind):
    class Frozen(Needy):
        def __init__(self):
            super().__init__()
            self.options = {"lr": 0.0}

    class Looks(CollapseGuard):
        def on_validation_end(self, trainer, pl_module):
            removed = sum(int((p == 0).sum()) for n, p in pl_module.named_parameters() if n in callback.masks)
            super().on_validation_end(trainer, pl_module)
            if self.protected and not seen:
                seen.extend([removed, {n: p.clone() for n, p in pl_module.named_parameters()}])

    seen = []
    callback = kind(schedule=Linear(), window=Window(7, 8, 1, unit="steps"), scope=Local())
    with pytest.warns(UserWarning, match="is protected"):
        fit(callback, Looks(monitor="val/acc"), module=Frozen)
    assert seen[0] == pytest.approx(0.7 * 288, abs=2)
    for name, parameter in Needy().named_parameters():
        assert torch.equal(seen[1][name], parameter)


@BOTH
def test_it_comes_back_alike_whether_optimizers_hold_all_or_the_survivors(kind, monkeypatch):
    monkeypatch.setattr(reach, "ELEMENTWISE", dict.fromkeys(reach.ELEMENTWISE, reach.Reach(1.0, 1)))
    monkeypatch.setattr(in_training, "RESTFUL", 1)

    def run(compact):
        guard = CollapseGuard(0.2, monitor="val/acc")
        _, trained = fit(kind(scope=Local(), window=Window(every=0.2), compact=compact), guard)
        return guard.protected, trained.state_dict()

    with pytest.warns(UserWarning, match="are undone"):
        (protected, ours), (_, whole) = run(True), run(False)
    assert protected and all(torch.equal(ours[name], whole[name]) for name in whole)


@BOTH
@pytest.mark.parametrize("kill_at", [13, 20])
def test_a_killed_run_goes_on_bit_for_bit(kind, kill_at, tmp_path):
    def run(folder, kill_at=None, ckpt_path=None):
        callback, guard = kind(scope=Local()), CollapseGuard(0.2, monitor="val/acc")
        fitted, trained = fit(guard, callback, DyingCheckpoint(folder, kill_at), ckpt_path=ckpt_path)
        return everything(fitted, trained, callback), guard

    with pytest.warns(UserWarning, match="is protected"):
        whole, guard = run(tmp_path / "whole")
    in_a_process_that_dies(lambda: run(tmp_path, kill_at))
    resumed, again = run(tmp_path, ckpt_path=tmp_path / f"step={kill_at}.ckpt")
    assert_equal(whole, resumed)
    assert again.protected == guard.protected and again.best == guard.best


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (None, "`callbacks` has one TrainTimePruning or SparseTraining with CollapseGuard, but got none"),
        (
            SparseTraining(0.5, report=False),
            "SparseTraining, whose layers never lose a weight without another",
        ),
        (
            growing(sparsity=None, scope=NofM()),
            r"SparseTraining, whose scope, NofM\(.*, gives each layer its",
        ),
        (pruning(granularity=Channel()), r"TrainTimePruning, whose granularity, Channel\(.*`min_keep`"),
        (pruning(masking=StraightThrough()), r"TrainTimePruning, whose masking, StraightThrough\("),
        (pruning(sparsity=None, scope=NofM()), r"TrainTimePruning, whose scope, NofM\("),
        (
            WeightRewinding(0.5, num_levels=1, report=False),
            "WeightRewinding, which prunes between two trainings",
        ),
        (InitialPruning(0.5, report=False), "InitialPruning, which prunes once, before training starts"),
    ],
)
def test_what_cannot_be_rolled_back_is_refused(callback, reason):
    with pytest.raises(ValueError, match=reason):
        fit(CollapseGuard(), *([callback] if callback else []))


def test_less_of_a_loss_is_better_without_being_told():
    assert CollapseGuard(monitor="val_loss", tolerance=0.01).mode == "min"
    assert CollapseGuard(monitor="val/acc").mode == "max"
    assert CollapseGuard(monitor="elegance", mode="max").mode == "max"
    with pytest.raises(ValueError, match="`mode` is 'min' or 'max', what is better of 'elegance'"):
        CollapseGuard(monitor="elegance")


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"`monitor` is one of .*'val/acc'.*Did you mean val/acc"):
        fit(CollapseGuard(monitor="val/accuracy"), pruning())


def test_a_metric_that_a_barebones_trainer_does_not_log_is_refused_before_training():
    with pytest.raises(ValueError, match=r"`monitor` is None with Trainer\(barebones=True\)"):
        fit(CollapseGuard(monitor="val/acc"), pruning(), barebones=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"min_density": 1.0}, "`min_density`"),
        ({"mode": "best"}, "`mode` is one of"),
        ({"tolerance": 0.0}, "`tolerance` is a number above 0"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        CollapseGuard(**settings)
