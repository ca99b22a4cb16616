"""Ctrl-C, for real: a process is sent SIGINT, and what it was done with is gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_prune import cli
from lightning_prune.report.storage import load
from tests.hydra_runs import QUIET, SMALL, composed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The learning rate had fallen"),
]
SMALL_NET = ("model=mlp", "model.sizes=[64,256,256,256,256,10]")


def interrupted(
    command: list[str], root, env, folder: Path | None, is_time: Callable[[], bool]
) -> tuple[int, str]:
    """Start a command, send it SIGINT when it is time, and return its code and what it has said."""
    process = subprocess.Popen(
        [sys.executable, *command, *([f"hydra.run.dir={folder}"] if folder else [])],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        end = time.monotonic() + 240
        while process.poll() is None and not is_time() and time.monotonic() < end:
            time.sleep(0.01)
        for _ in range(3):  # on a loaded machine an interrupt can get lost, and a user would press again
            if process.poll() is None:
                os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=40)
                return process.returncode, said
        pytest.fail("the process did not end")
    finally:
        process.kill()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    cli.train(composed(*SMALL, *QUIET, *SMALL_NET, "pruning=none", output_dir=folder))
    return folder / "checkpoints" / "last.ckpt"


def test_a_training_is_reported_on_and_its_command_goes_on(root, subprocess_env, tmp_path):
    """What is done is the last checkpoint, of the end of an epoch; the report says how to go on from it."""
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    words = ["train.py", "pruning=gradual", "trainer=cpu", "trainer.max_epochs=100000", QUIET[0]]
    code, said = interrupted(words, root, subprocess_env, tmp_path, checkpoint.is_file)
    assert code == 1 and "Traceback" not in said
    report = load(tmp_path / "report.json")
    assert "interrupted after" in report.warnings[-1] and report.checkpoint == str(checkpoint)
    assert report.updates and report.evaluations and (tmp_path / "report.html").is_file()
    assert f"Go on: {report.resume_command}" in said
    settings = [word for word in shlex.split(report.resume_command)[2:] if "max_epochs" not in word]
    saved = torch.load(checkpoint, weights_only=True)
    length = saved["epoch"] + 2
    more = [*settings, f"trainer.max_epochs={length}", *QUIET, "pruning.window.end=1.0", "test=false"]
    with pytest.warns(UserWarning, match="`window` was"):
        cli.train(composed(*more, "trainer.enable_progress_bar=false", output_dir=tmp_path / "more"))
    again = load(tmp_path / "more" / "report.json")
    assert again.evaluations[-1].step > saved["global_step"] > 0


def test_layers_that_are_solved_are_not_solved_again(root, subprocess_env, tmp_path, dense):
    """What is done are the layers that SparseGPT has solved; the model that comes of it is that of a whole run."""
    words = [
        "train.py",
        "pruning=sparsegpt",
        "train=false",
        f"ckpt_path={dense}",
        "trainer=cpu",
        *SMALL_NET,
        *QUIET,
    ]
    slow = ["pruning.solver.block_size=1", "pruning.num_calibration_batches=30"]
    solved = tmp_path / "half" / "checkpoints" / "unfinished"

    def is_time() -> bool:
        return len(list(solved.glob("*.pt"))) >= 1

    code, said = interrupted([*words, *slow], root, subprocess_env, tmp_path / "half", is_time)
    assert code in (1, 130) and "Traceback" not in said, said
    assert 1 <= len(list(solved.glob("*.pt"))) < 5, "it was too fast to be interrupted"
    assert f"unfinished={solved}" in said

    def prune(folder: Path, *more: str) -> dict[str, torch.Tensor]:
        quiet = "trainer.enable_progress_bar=false"
        cli.train(composed(*words[1:], *slow, *more, quiet, "test=false", output_dir=folder))
        return torch.load(folder / "checkpoints" / "pruned.ckpt", weights_only=True)["state_dict"]

    rest, whole = prune(tmp_path / "rest", f"pruning.unfinished={solved}"), prune(tmp_path / "whole")
    assert all(torch.equal(rest[name], tensor) for name, tensor in whole.items())
    assert not solved.exists() and not (tmp_path / "whole" / "checkpoints" / "unfinished").exists()


def test_curves_that_are_known_are_not_measured_again(root, subprocess_env, tmp_path, dense):
    """What is done are the validations in `sensitivity.json`."""
    words = [
        "sensitivity.py",
        f"ckpt_path={dense}",
        "trainer=cpu",
        *SMALL_NET,
        "sparsities=[0.5,0.6,0.7,0.8,0.9]",
    ]
    file = tmp_path / "half" / "sensitivity.json"
    code, said = interrupted(words, root, subprocess_env, tmp_path / "half", file.is_file)
    assert code in (1, 130) and "Traceback" not in said, said
    half = json.loads(file.read_text())
    assert "allocation" not in half and f"curves={file}" in said
    known = sum(len(curve) for curve in half["curves"].values())
    assert 0 < known < 5 * 6
    found = {}
    for name, more in {"rest": [f"curves={file}"], "whole": []}.items():
        (tmp_path / name).mkdir()
        cfg = composed(*words[1:], *more, config_name="sensitivity", output_dir=tmp_path / name)
        cli.analyse(cfg)
        found[name] = json.loads((tmp_path / name / "sensitivity.json").read_text())
    assert found["rest"] == found["whole"]


SLOW_STEPS = """
import sys
import time
from pathlib import Path

import lightning as L
from lightning_prune import *
from lightning_prune.examples.data import Digits
from lightning_prune.examples.tasks import Classifier


class Slow(Classifier):
    def training_step(self, batch, batch_idx):
        if {is_slow}:
            time.sleep(0.2)
            Path("batches.txt").open("a").write("x")
        return super().training_step(batch, batch_idx)


if __name__ == "__main__":
    L.seed_everything(0)
    pruning = {pruning}
    trainer = L.Trainer(max_epochs=1, callbacks=[pruning], accelerator="cpu", logger=False, default_root_dir="here")
    model = Slow("MLP", sizes=[64, 32, 10])
    {run}
    trainer.save_checkpoint("end.ckpt")
"""
CALIBRATIONS = {
    "after": ("PostTrainingPruning(0.5, criterion=Wanda(), scope=PerRow(), num_calibration_batches=20)",
              "pruning.run(trainer, model, Digits(batch_size=32))", "True"),
    "before": ("InitialPruning(0.9, num_calibration_batches=5, num_rounds=4)",
               "trainer.fit(model, Digits(batch_size=32))", "pruning.ramp is None or not pruning.updates"),
}  # fmt: skip


@pytest.mark.parametrize("when", CALIBRATIONS)
def test_batches_of_calibration_are_not_run_again(root, subprocess_env, tmp_path, when):
    """What is done are sums, and rounds: twenty batches in all, and the weights of a run that was left alone."""
    pruning, run, is_slow = CALIBRATIONS[when]
    text = SLOW_STEPS.format(pruning=pruning, run=run, is_slow=is_slow)
    ends, env = {}, {**subprocess_env, "PYTHONPATH": str(root)}
    for name in ("whole", "cut"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.py").write_text(text)
        batches = folder / "batches.txt"
        if name == "cut":
            code, said = interrupted(
                ["train.py"], folder, env, None, lambda f=batches: f.is_file() and f.stat().st_size >= 8
            )
            assert code in (1, 130, -signal.SIGINT), said
            assert f"go on with unfinished={Path('here') / 'checkpoints' / 'unfinished'}" in said.replace(
                str(folder) + "/", ""
            )
            assert 8 <= batches.stat().st_size < 20
        done = subprocess.run(
            [sys.executable, "train.py"], cwd=folder, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert batches.stat().st_size == 20
        assert not list(folder.rglob("unfinished"))
        ends[name] = torch.load(folder / "end.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(ends["cut"][name], tensor) for name, tensor in ends["whole"].items())


def test_latencies_are_not_measured_again(root, subprocess_env, tmp_path):
    """What is done are the measurements in `latencies.json`."""
    budget = ["pruning=latency_budget", "pruning.budget.tolerance=0.05"]  # the machine may be busy
    words = ["train.py", *budget, "trainer.max_epochs=1", "trainer=cpu", *QUIET]
    file, known = tmp_path / "checkpoints" / "latencies.json", {}

    def measured() -> dict[str, float]:
        return json.loads(file.read_text()) if file.is_file() else {}

    for _ in range(2):
        code, said = interrupted(
            words, root, subprocess_env, tmp_path, lambda n=len(known): len(measured()) > n
        )
        assert code in (1, 130) and "Traceback" not in said, said
        assert known.items() < measured().items()
        known = measured()
    command = [sys.executable, *words, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=root, env=subprocess_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not file.exists()
