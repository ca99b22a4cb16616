"""Progress is seen on terminals, by whoever asked for it, in the first process, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prune.report import progress
from lightning_prune.report.progress import is_first_process, showing, steps, working
from tests.terminals import run_in_terminal

SCRIPT = """
import sys, time
from contextlib import nullcontext
from rich.progress import Progress
from rich import get_console
from lightning_prune.report.progress import showing, steps, working

with showing() if "shown" in sys.argv else nullcontext():
    outer = Progress(console=get_console()) if "inside" in sys.argv else nullcontext()
    with outer:
        for _ in steps([1, 2, 3], "going through layers"):
            time.sleep(0.3)  # what takes long
        assert list(steps(iter("ab"), "without a length")) == ["a", "b"]
        with working("measuring something"):
            pass
print("done")
"""


def test_where_nobody_looks_nothing_is_written(capfd):
    with showing():
        assert list(steps([1, 2], "x")) == [1, 2]
        with working("y"):
            pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("more", [[], ["inside"]], ids=["alone", "below another bar"])
def test_on_a_terminal_it_is_seen(root, subprocess_env, more):
    command = [sys.executable, "-c", SCRIPT, "shown", *more]
    code, seen = run_in_terminal(command, root, subprocess_env)
    assert code == 0, seen
    assert (
        "going through layers" in seen and "2/3" in seen and "measuring something" in seen and "done" in seen
    )


@pytest.mark.parametrize("env", [{"RANK": "1"}, {"LOCAL_RANK": "3"}, {"SLURM_PROCID": "2"}])
def test_other_processes_are_quiet_on_a_terminal_too(root, subprocess_env, env):
    code, seen = run_in_terminal([sys.executable, "-c", SCRIPT, "shown"], root, {**subprocess_env, **env})
    assert code == 0 and seen.split() == ["done"]


def test_functions_that_are_called_by_themselves_are_quiet(root, subprocess_env):
    code, seen = run_in_terminal([sys.executable, "-c", SCRIPT], root, subprocess_env)
    assert code == 0 and seen.split() == ["done"]


def test_a_pipe_is_no_terminal_even_where_colours_are_forced(root, subprocess_env):
    env = {**subprocess_env, "FORCE_COLOR": "1"}
    env.pop("NO_COLOR")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "shown"], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.split() == ["done"] and done.stderr == ""


def test_ranks_are_told_by_the_environment(monkeypatch):
    for name in progress.RANKS:
        monkeypatch.delenv(name, raising=False)
    assert is_first_process()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert is_first_process()
    monkeypatch.setenv("NODE_RANK", "1")
    assert not is_first_process()


@pytest.mark.slow
def test_a_run_shows_its_sparsity_and_its_long_steps(root, subprocess_env, tmp_path):
    """A dense run, then SparseGPT on it: the bar of the training shows the sparsity, the solver its layers."""
    common = [
        "trainer=cpu",
        "data.batch_size=64",
        "callbacks.monitor.latency=false",
        "callbacks.monitor.show=false",
    ]

    def run(folder: Path, *words: str) -> str:
        command = [sys.executable, "train.py", *common, *words, f"hydra.run.dir={folder}"]
        code, seen = run_in_terminal(command, root, subprocess_env)
        assert code == 0, seen[-2000:]
        return seen

    fit = run(
        tmp_path / "fit", "pruning=global_unstructured", "trainer.max_epochs=2", "pruning.window.end=0.5"
    )
    assert "pruning/sparsity: 0.900" in fit
    checkpoint = f"ckpt_path={tmp_path}/fit/checkpoints/last.ckpt"
    solved = run(tmp_path / "solved", "pruning=sparsegpt", "train=false", checkpoint, "pruning.sparsity=0.95")
    assert "SparseGPT, layer by layer" in solved
    wanda = run(tmp_path / "wanda", "pruning=wanda", "train=false", checkpoint, "pruning.sparsity=0.95")
    assert "calibration" in wanda
