"""What `python train.py` does, in this process: every recipe on a few batches of the digits."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
import yaml

from lightning_prune import cli
from lightning_prune.examples.tasks import Classifier
from lightning_prune.report.storage import load
from tests.hydra_runs import QUIET, SMALL, composed, options

N_OF_M = ("n_of_m", "sr_ste", "sparsegpt_2_4", "wanda_2_4", "rigl_2_4")
EXPECTED = {"none": 0.0, "rows": 0.5} | dict.fromkeys(N_OF_M)
STRUCTURED = {  # recipe -> sparsity of its pieces, further settings
    "global_structured": (0.5, ()),
    "local_structured": (0.5, ()),
    "network_slimming": (0.5, ()),
    "sparse_learning": (0.5, ()),
    "latency_budget": (None, ("pruning.budget.tolerance=0.4",)),  # no quiet machine is asked for
    "heads": (0.25, ("model=gpt", "data=tinyshakespeare", "model.num_layers=1", "data.block_size=16")),
    "depth": (0.25, ("model=resnet20",)),
    "reconstruct_channels": (0.25, ()),  # of the 30 % that it asks for, as sizes are multiples
}


def train(folder, *overrides: str):
    return cli.train(composed(*SMALL, *QUIET, *overrides, output_dir=folder))


def zeros_of(weights: dict[str, torch.Tensor]) -> float:
    chosen = [tensor for name, tensor in weights.items() if name.endswith("weight") and tensor.dim() > 1]
    return 1 - sum(int(t.count_nonzero()) for t in chosen) / sum(t.numel() for t in chosen)


@pytest.fixture(autouse=True)
def expected_warnings(recwarn):
    """Two epochs of ten batches are too short for a learning rate to stay high: that warning is not at stake here."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The learning rate had fallen")
        yield


@pytest.mark.parametrize("recipe", [name for name in options("pruning") if name not in STRUCTURED])
def test_every_recipe_trains_reports_and_leaves_a_plain_checkpoint(tmp_path, recipe):
    metrics = train(tmp_path, f"pruning={recipe}")
    after_training = composed(f"pruning={recipe}").get("pruning", {}).get("checkpoint") is not None
    expected = EXPECTED.get(recipe, 0.5 if after_training else 0.9)
    assert metrics["sparsity"] == pytest.approx(
        expected if expected is not None else metrics["sparsity"], abs=0.02
    )
    assert metrics["sparsity"] > 0.45 or recipe == "none"
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cost_after"]["nonzeros"] == metrics["nonzeros"]
    assert (tmp_path / "report.md").is_file()
    name = "pruned.ckpt" if after_training else "last.ckpt"
    saved = torch.load(tmp_path / "checkpoints" / name, weights_only=True)["state_dict"]
    if recipe not in ("rows", *N_OF_M):  # these leave some weights dense
        assert zeros_of(saved) == pytest.approx(metrics["sparsity"], abs=1e-3)
    loaded = Classifier.load_from_checkpoint(tmp_path / "checkpoints" / name, weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(("recipe", "last"), [("none", 1), ("gradual", 3)])
def test_early_stopping_waits_for_the_final_sparsity(tmp_path, recipe, last):
    never_better = ("callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=100")
    ramp = ("pruning.window.end=0.5",) if recipe == "gradual" else ()  # three of six epochs
    train(
        tmp_path,
        f"pruning={recipe}",
        "callbacks=early_stopping",
        "trainer.max_epochs=6",
        *never_better,
        *ramp,
    )
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == last  # the first one that counts is the best, the next one is not better


@pytest.mark.parametrize("recipe", STRUCTURED)
def test_every_structured_recipe_leaves_a_smaller_model(tmp_path, recipe):
    sparsity, settings = STRUCTURED[recipe]
    if "data=tinyshakespeare" in settings:
        (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be " * 200)
        settings = (*settings, f"data.root={tmp_path}")
    shared = [setting for setting in settings if not setting.startswith("pruning")]
    dense = train(tmp_path / "dense", "pruning=none", *shared)
    metrics = train(tmp_path, f"pruning={recipe}", *settings)
    assert metrics["params"] < 0.95 * dense["params"]
    if sparsity is not None:
        assert metrics["sparsity"] == pytest.approx(sparsity, abs=0.1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cost_before"]["params"] == dense["params"]
    assert report["equivalence_error"] < 1e-10
    name = "pruned.ckpt" if recipe in ("depth", "reconstruct_channels") else "last.ckpt"
    checkpoint = f"ckpt_path={tmp_path}/checkpoints/{name}"
    quiet = ("trainer=cpu", "trainer.enable_progress_bar=false", checkpoint)
    evaluated = cli.evaluate(composed(*quiet, *shared, config_name="eval", output_dir=tmp_path))
    kind = "test/acc" if "test/acc" in metrics else "test/loss"
    assert evaluated[kind] == pytest.approx(metrics[kind], rel=1e-6)


def test_the_test_sees_the_pruned_model(tmp_path):
    metrics = train(tmp_path, "pruning=global_unstructured")
    evaluated = cli.evaluate(
        composed(
            "trainer=cpu",
            "trainer.enable_progress_bar=false",
            f"ckpt_path={tmp_path}/checkpoints/last.ckpt",
            config_name="eval",
            output_dir=tmp_path,
        )
    )
    assert evaluated["test/acc"] == metrics["test/acc"]
    assert evaluated["sparsity"] == pytest.approx(metrics["sparsity"], abs=1e-3)


def test_a_trained_model_is_pruned_without_training(tmp_path):
    dense = train(tmp_path / "dense", "pruning=none")
    checkpoint = tmp_path / "dense" / "checkpoints" / "last.ckpt"
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    metrics = train(
        tmp_path, "pruning=one_shot", "train=false", f"ckpt_path={checkpoint}", "pruning.sparsity=0.3"
    )
    assert metrics["sparsity"] == pytest.approx(0.3, abs=0.01)
    after = torch.load(next(tmp_path.glob("**/pruned.ckpt")), weights_only=True)["state_dict"]
    for name, tensor in after.items():
        kept = (
            tensor != 0
            if name.endswith("weight") and tensor.dim() > 1
            else torch.ones_like(tensor, dtype=torch.bool)
        )
        assert torch.equal(tensor[kept], before[name][kept]), name
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics_before"]["val/acc"] == pytest.approx(dense["val/acc"])


def test_a_checkpoint_of_one_whole_epoch_is_calibrated_on_all_data(tmp_path):
    """The place within the epoch, its end, is that of a training which goes on, and of nothing else."""
    train(tmp_path / "dense", "pruning=none", "trainer.max_epochs=1", "trainer.limit_train_batches=1.0")
    checkpoint = f"ckpt_path={tmp_path}/dense/checkpoints/last.ckpt"
    assert train(tmp_path, "pruning=wanda", "train=false", checkpoint)["sparsity"] == pytest.approx(
        0.5, abs=0.01
    )


def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    every = ("+callbacks.checkpoint.every_n_train_steps=7", "callbacks.checkpoint.filename='{step}'")
    keep_all = ("+callbacks.checkpoint.save_top_k=-1", "pruning=global_unstructured")
    train(tmp_path / "whole", *every, *keep_all)
    checkpoints = tmp_path / "whole" / "checkpoints"
    middle = checkpoints / "7.ckpt"
    train(
        tmp_path / "resumed",
        *every,
        *keep_all,
        f"ckpt_path={middle}",
        f"callbacks.checkpoint.dirpath={checkpoints}-2",
    )
    whole, resumed = (
        torch.load(folder / "14.ckpt", weights_only=True)
        for folder in (checkpoints, tmp_path / "whole" / "checkpoints-2")
    )
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_the_report_knows_how_the_run_was_started_and_goes_on(tmp_path):
    """The command in the report, word for word, trains on from the checkpoint; secrets are in neither of them."""
    secret = "++mine={api_key: s3cr3t, colour: blue}"
    train(tmp_path, "pruning=global_unstructured", secret)
    written = "".join((tmp_path / name).read_text() for name in ("report.json", "report.html", "report.md"))
    assert "s3cr3t" not in written and "blue" in written
    report = load(tmp_path / "report.json")
    config = yaml.safe_load(report.config)
    assert config["pruning"]["sparsity"] == 0.9 and config["mine"] == {"api_key": "***", "colour": "blue"}
    assert config["trainer"]["default_root_dir"] == "${hydra:runtime.output_dir}"  # as it was written
    words = shlex.split(report.resume_command)
    assert words[0] == "python" and shlex.split(report.command) == words[:-1]
    more = [word for word in words[2:] if "hydra." not in word]
    cli.train(composed(*more, "trainer.max_epochs=3", output_dir=tmp_path / "more"))
    assert load(tmp_path / "more" / "report.json").evaluations[-1].step == 3 * 10
    namespace: dict[str, object] = {}
    exec(report.load_command, namespace)
    assert isinstance(namespace["model"], Classifier)


def test_a_sweeper_gets_the_numbers_it_asks_for(tmp_path):
    one = train(tmp_path, "optimized_metric=test/acc", "pruning=none")
    assert isinstance(one, float)
    two = train(tmp_path, "optimized_metric=[test/acc,sparsity]", "pruning=none")
    assert two == (one, 0.0)
    with pytest.raises(ValueError, match="`optimized_metric` is one of .* Did you mean test/acc"):
        cli.chosen({"test/acc": 1.0}, "test/ac")


@pytest.mark.parametrize("debug", options("debug"))
def test_every_debug_setting_runs(tmp_path, debug):
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You requested to overfit")
        warnings.filterwarnings("ignore", "You have turned on .Trainer.detect_anomaly")
        overrides = [
            "trainer=cpu",
            "trainer.enable_progress_bar=false",
            f"debug={debug}",
            "pruning=local_unstructured",
        ]
        metrics = cli.train(composed(*overrides, *QUIET, "test=true", output_dir=tmp_path))
    assert "train/loss" in metrics


def test_loggers_write_what_they_are_named_for(tmp_path):
    train(tmp_path / "csv", "logger=csv")
    assert "val/acc" in (tmp_path / "csv" / "csv" / "metrics.csv").read_text()
    train(tmp_path / "board", "logger=tensorboard")
    assert list((tmp_path / "board" / "tensorboard").glob("events.*"))


def test_one_seed_gives_one_result(tmp_path):
    first, second, other = (train(tmp_path, "pruning=random", f"seed={seed}") for seed in (3, 3, 4))
    assert first == second
    assert first["test/loss"] != other["test/loss"]


@pytest.mark.slow
def test_two_processes_train_and_prune_as_one(root, subprocess_env, tmp_path):
    command = [
        sys.executable,
        "train.py",
        "pruning=global_unstructured",
        *SMALL[1:],
        "trainer=ddp_sim",
        *QUIET,
    ]
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path}"],
        cwd=root,
        env=subprocess_env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert (tmp_path / "report.json").is_file()
