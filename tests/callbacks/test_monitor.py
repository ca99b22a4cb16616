"""The report of a run tells what happened, with numbers that are counted here a second time."""

import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_prune import (
    Channel,
    Constant,
    Linear,
    PostTrainingPruning,
    Slice,
    SparsityMonitor,
    TrainTimePruning,
    Weight,
    Window,
)
from lightning_prune.callbacks import monitor as monitor_file
from lightning_prune.report.data import Evaluation
from lightning_prune.report.numbers import numbers_of
from lightning_prune.report.storage import load
from tests.callbacks.toy import Toy, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")


def fit(tmp_path, *callbacks, module=None, latency=False, **options):
    """Latency takes seconds: where it is not asked for, the monitor is one that does not measure it."""
    module = module or Toy()
    own = (
        []
        if latency or any(isinstance(cb, SparsityMonitor) for cb in callbacks)
        else [SparsityMonitor(latency=False)]
    )
    run = trainer(*callbacks, *own, default_root_dir=tmp_path, **options)
    run.fit(module, data(), data())
    return run, module


def test_train_time_report(tmp_path, capsys):
    callback = TrainTimePruning(0.8, schedule=Linear(), window=Window(0, 16, 8, unit="steps"))
    run, module = fit(tmp_path, callback, ModelCheckpoint(tmp_path, save_last=True), latency=True)
    report = load(tmp_path / "report.json")
    assert report.kind == "train_time" and report.target_sparsity == 0.8
    assert report.recipe["schedule"] == "Linear()" and report.recipe["criterion"] == "Magnitude(p=1.0)"
    assert [(u.step, round(u.requested, 3)) for u in report.updates] == [(0, 0.0), (8, 0.4), (16, 0.8)]
    assert [round(u.achieved, 2) for u in report.updates] == [0.0, 0.4, 0.8]
    assert [e.step for e in report.evaluations] == [6, 12, 18, 24] and report.evaluations[
        -1
    ].sparsity == pytest.approx(0.8, abs=0.005)
    assert report.metrics_after["val/acc"] == pytest.approx(float(run.callback_metrics["val/acc"]))
    assert report.metrics_before == report.evaluations[0].metrics  # the last one that was dense
    parameters = dict(module.named_parameters())
    assert report.cost_after.params == sum(p.numel() for p in parameters.values())
    assert report.cost_after.nonzeros == sum(int(p.count_nonzero()) for p in parameters.values())
    assert report.cost_before.nonzeros > report.cost_after.nonzeros
    macs = 8 * (8 * 16 + 16 * 8 + 8 * 4)
    assert report.cost_before.macs == macs == report.cost_after.macs
    assert {layer.name: layer.nonzeros for layer in report.layers} == {
        name: int(parameters[name].count_nonzero()) for name in callback.masks
    }
    assert report.cost_before.latency.median_ms > 0 and report.cost_after.latency.median_ms > 0
    assert report.checkpoint == str(tmp_path / "last.ckpt") or report.checkpoint.endswith(".ckpt")
    shown = capsys.readouterr().out
    assert "report.html" in shown and "80" in shown and (tmp_path / "report.md").read_text().startswith("# ")


def test_post_training_report_has_before_and_after(tmp_path):
    callback = PostTrainingPruning(0.9, granularity=Slice(dim=1))
    fit(tmp_path, callback, ModelCheckpoint(tmp_path))
    report = load(tmp_path / "report.json")
    assert report.kind == "post_training" and report.checkpoint == str(tmp_path / "pruned.ckpt")
    assert report.metrics_before == callback.metrics_before and report.metrics_after == callback.metrics_after
    assert sum(layer.num_groups for layer in report.layers) == 8 + 16 + 8
    kept = sum(layer.num_kept for layer in report.layers)
    assert kept == 32 - round(0.9 * 32)


def test_run_without_training_reports_as_well(tmp_path):
    dense = ModelCheckpoint(tmp_path, filename="dense")
    fit(tmp_path, dense)

    class Plain(L.LightningDataModule):
        train_dataloader = val_dataloader = staticmethod(data)

    callback = PostTrainingPruning(0.5)
    run = trainer(callback, SparsityMonitor(latency=False), default_root_dir=tmp_path / "after")
    callback.run(run, Toy(), Plain(), ckpt_path=tmp_path / "dense.ckpt")
    report = load(tmp_path / "after" / "report.json")
    assert (
        report.metrics_before == callback.metrics_before and report.cost_before.macs == report.cost_after.macs
    )
    assert report.achieved_sparsity == pytest.approx(0.5, abs=0.01)


def test_a_dense_run_is_reported_on_too(tmp_path):
    _, module = fit(tmp_path, SparsityMonitor(tmp_path / "here", show=False, latency=False))
    report = load(tmp_path / "here" / "report.json")
    assert report.kind == "none" and report.layers == () and report.achieved_sparsity is None
    assert report.cost_after.nonzeros == sum(int(p.count_nonzero()) for p in module.parameters())
    assert report.metrics_after["val/acc"] == report.evaluations[-1].metrics["val/acc"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("pruning", [{}, {"granularity": Channel(multiple_of=1), "include": ["body"]}])
def test_a_compiled_part_is_seen_as_it_is_called(pruning, tmp_path):
    """What dynamo traces must not change what watches the calls."""
    module = Toy()
    module.body = torch.compile(module.body, backend="eager")
    fit(tmp_path, TrainTimePruning(0.5, **pruning), SparsityMonitor(tmp_path, latency=False), module=module)
    report = load(tmp_path / "report.json")
    assert report.cost_before.macs == 8 * (8 * 16 + 16 * 8 + 8 * 4)
    assert report.achieved_sparsity == pytest.approx(0.5, abs=0.05)


def test_a_run_that_is_to_prune_nothing_has_the_metrics_of_its_dense_model(tmp_path):
    """The baseline of a sweep is its job with sparsity=0."""
    run, _ = fit(tmp_path, TrainTimePruning(0.0))
    report = load(tmp_path / "report.json")
    assert report.metrics_after["val/acc"] == pytest.approx(float(run.callback_metrics["val/acc"]))
    assert numbers_of(report)["val/acc"] == report.metrics_after["val/acc"]


def test_one_monitor_whether_one_is_given_or_not(tmp_path):
    own = SparsityMonitor(tmp_path / "own", latency=False, show=False)
    run, _ = fit(tmp_path, own, TrainTimePruning(0.5))
    assert [cb for cb in run.callbacks if isinstance(cb, SparsityMonitor)] == [own]
    assert (tmp_path / "own" / "report.json").exists() and not (tmp_path / "report.json").exists()
    assert own.report.cost_after.latency is None
    none, _ = fit(tmp_path / "none", TrainTimePruning(0.5, report=False), latency=True)
    assert not [cb for cb in none.callbacks if isinstance(cb, SparsityMonitor)]


def test_it_lies_in_the_loggers_folder(tmp_path):
    run, _ = fit(tmp_path, TrainTimePruning(0.5), logger=CSVLogger(tmp_path, name="csv"))
    assert load(f"{run.log_dir}/report.json").kind == "train_time"


def test_measuring_changes_nothing(tmp_path):
    """With and without a report, the weights are the same bit for bit: dropout and batch norm do not notice."""
    trained = []
    for report in (True, False):
        torch.manual_seed(5)
        _, module = fit(tmp_path, TrainTimePruning(0.5, report=report), latency=True)
        trained.append(module.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_a_resumed_run_reports_the_whole(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callback = TrainTimePruning(0.8, schedule=Linear(), window=Window(0, 16, 4, unit="steps"))
    fit(tmp_path, callback, checkpoint)
    expected = load(tmp_path / "report.json")
    resumed = TrainTimePruning(0.8, schedule=Linear(), window=Window(0, 16, 4, unit="steps"))
    again = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(resumed, again, SparsityMonitor(latency=False), default_root_dir=tmp_path / "resumed")
    run.fit(Toy(), data(), data(), ckpt_path=tmp_path / "step=15.ckpt")
    report = load(tmp_path / "resumed" / "report.json")
    assert report.updates == expected.updates and report.layers == expected.layers
    assert report.evaluations == expected.evaluations
    assert report.cost_before.nonzeros == expected.cost_before.nonzeros


def test_warnings_are_in_the_report(tmp_path):
    class Decaying(Toy):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with pytest.warns(UserWarning, match="learning rate had fallen"):
        fit(tmp_path, TrainTimePruning(0.5), module=Decaying())
    assert "learning rate had fallen" in load(tmp_path / "report.json").warnings[0]


def test_before_is_dense_even_if_pruning_comes_before_the_first_step(tmp_path):
    fit(tmp_path, TrainTimePruning(0.9, schedule=Constant(), window=Window(end=0.0)))
    report = load(tmp_path / "report.json")
    assert report.cost_before.sparsity == pytest.approx(
        16 / 332, abs=0.02
    )  # batch norm starts with zero biases
    macs = 8 * (8 * 16 + 16 * 8 + 8 * 4)
    assert report.cost_before.macs == report.cost_before.effective_macs == macs == report.cost_after.macs
    assert report.cost_after.effective_macs < 0.2 * macs and "macs" not in report.cost_before.unmeasured


def test_two_callbacks_share_one_report(tmp_path):
    fit(tmp_path, TrainTimePruning(0.9, include=["body"]), TrainTimePruning(0.5, include=["head"]))
    report = load(tmp_path / "report.json")
    assert report.recipe["sparsity (1)"] == "0.9" and report.recipe["sparsity (2)"] == "0.5"
    assert {layer.name: round(layer.sparsity, 1) for layer in report.layers}["head.weight"] == 0.5
    assert report.target_sparsity == pytest.approx((0.9 * 256 + 0.5 * 32) / 288)


def test_validations_of_a_checkpoint_that_is_not_trained_stand_where_its_training_ended():
    monitor, trained = SparsityMonitor(), SparsityMonitor()
    trained._evaluations = [
        Evaluation(40, 0.0, {"val/acc": 0.5}, 0),
        Evaluation(80, 0.0, {"val/acc": 0.6}, 1),
    ]
    monitor.load_state_dict(trained.state_dict())
    trainer = SimpleNamespace(
        sanity_checking=False, callback_metrics={"val/acc": 0.4}, callbacks=[], global_step=0, current_epoch=0
    )
    monitor.on_validation_end(trainer, None)
    assert [(e.step, e.epoch) for e in monitor._evaluations] == [(40, 0), (80, 1), (80, 1)]
    trainer.global_step, trainer.current_epoch = 120, 2
    monitor.on_validation_end(trainer, None)
    assert [(e.step, e.epoch) for e in monitor._evaluations][-1] == (120, 2)


def test_latencies_are_measured_where_the_model_was_trained(tmp_path, monkeypatch):
    """Lightning moves a model to the CPU when its run on another device is over."""

    class Moved(Toy):
        moves = ()

        def to(self, device):
            self.moves = (*self.moves, device)
            return super().to(device)

    monitor = SparsityMonitor(show=False, latency=False)
    run, module = fit(tmp_path, TrainTimePruning(0.5), monitor, module=Moved())
    there, seen = torch.device("cpu", 0), []
    monkeypatch.setattr(type(run.strategy), "root_device", there)
    measure = monitor_file.measure
    monkeypatch.setattr(
        monitor_file,
        "measure",
        lambda *args, **kwargs: (seen.append(module.moves), measure(*args, **kwargs))[1],
    )
    before = module.moves
    monitor.finish(run, module)
    assert seen == [(*before, there)] and module.moves == (*before, there, torch.device("cpu"))


class Distances(Toy):
    """Has an operation whose work nobody counts."""

    def forward(self, x):
        h = self.body(x)
        return self.head(h + torch.cdist(h, h).mean(1, keepdim=True))


def test_a_report_tells_why_the_work_of_the_call_is_not_counted(tmp_path):
    fit(tmp_path, TrainTimePruning(0.5), module=Distances())
    cost = load(tmp_path / "report.json").cost_before
    assert cost.macs is None and "no formula for _cdist_forward" in cost.unmeasured["macs"]


@pytest.mark.parametrize("granularity", [Weight(), Channel(multiple_of=1)])
def test_nobody_is_asked_to_add_the_monitor_of_a_run_that_is_over(granularity, tmp_path):
    fit = trainer(TrainTimePruning(0.5, granularity=granularity), default_root_dir=tmp_path)
    fit.fit(Toy(), data(), data())
    fit.save_checkpoint(path := tmp_path / "pruned.ckpt")
    later = trainer(TrainTimePruning(0.5, granularity=granularity), default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Be aware that when using `ckpt_path`, callbacks")
        (metrics,) = later.validate(Toy(), data(), ckpt_path=path, verbose=False)
    assert metrics == {
        name: pytest.approx(float(value)) for name, value in fit.callback_metrics.items() if "val" in name
    }
