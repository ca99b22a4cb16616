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


def interrupted(command: list[str], root, env, folder: Path, is_time: Callable[[], bool]) -> tuple[int, str]:
    """Start a command, send it SIGINT when it is time, and return its code and what it has said."""
    process = subprocess.Popen(
        [sys.executable, *command, f"hydra.run.dir={folder}"],
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
    solved = tmp_path / "half" / "checkpoints" / "solved"

    def is_time() -> bool:
        return len(list(solved.glob("*.pt"))) >= 1

    code, said = interrupted([*words, *slow], root, subprocess_env, tmp_path / "half", is_time)
    assert code in (1, 130) and "Traceback" not in said, said
    done = {file.name: file.stat().st_mtime_ns for file in solved.glob("*.pt")}
    assert 1 <= len(done) < 5, "it was too fast to be interrupted"
    assert f"solved={solved}" in said

    def prune(folder: Path, *more: str) -> dict[str, torch.Tensor]:
        quiet = "trainer.enable_progress_bar=false"
        cli.train(composed(*words[1:], *slow, *more, quiet, "test=false", output_dir=folder))
        return torch.load(folder / "checkpoints" / "pruned.ckpt", weights_only=True)["state_dict"]

    rest, whole = prune(tmp_path / "rest", f"pruning.solved={solved}"), prune(tmp_path / "whole")
    assert all(torch.equal(rest[name], tensor) for name, tensor in whole.items())
    assert not solved.exists() and not (tmp_path / "whole" / "checkpoints" / "solved").exists()


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
