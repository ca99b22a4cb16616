"""Jobs in processes of their own: killed, interrupted, resumed, for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from lightning_prune import sweep
from tests.hydra_runs import QUIET, SMALL
from tests.sweep.test_sweepers import TINY, results, run

pytestmark = pytest.mark.slow
NEEDED = ("hydra_plugins.hydra_joblib_launcher", "submitit", "optuna")


@pytest.fixture(autouse=True)
def _installed():
    missing = [name for name in NEEDED if find_spec(name) is None]
    assert not (missing and os.environ.get("CI")), missing
    if missing:
        pytest.skip(f"no {missing}: pip install '.[sweeps]'")


def start(root, env, *arguments):
    """Start a sweep in a group of processes of its own, as a terminal does."""
    command = [sys.executable, "train.py", "-m", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=root, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def pid_of(folder):
    return json.loads((folder / "job.json").read_text())["pid"]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_killed_job_loses_only_itself_and_goes_on_bit_for_bit(root, subprocess_env, tmp_path, launcher):
    """Two jobs that train the same, one of them killed with SIGKILL after its first checkpoint, then resumed."""
    arguments = [
        *SMALL,
        *QUIET,
        *("model=mlp", "pruning=gradual", "pruning.sparsity=0.8", "trainer.max_epochs=40"),
        *("trainer.log_every_n_steps=1,2", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}"),
    ]
    process = start(root, subprocess_env, *arguments)
    try:
        last = tmp_path / "0" / "checkpoints" / "last.ckpt"
        wait_for(last.is_file, process)
        victim = pid_of(tmp_path / "0")
        assert victim != process.pid
        os.kill(victim, signal.SIGKILL)
        output, errors = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 1, output + errors
    rows = results(tmp_path)
    assert {job: row["status"] for job, row in rows.items()} == {"0": "failed", "1": "done"}
    assert "its process ended before it did" in rows["0"]["error"]
    assert "job 0 failed: its process ended before it did" in output
    assert "1 of 2 jobs failed" in errors
    assert "resume=true" in output.partition("the rest: ")[2]

    done = run(root, subprocess_env, *arguments, "resume=true", timeout=500)
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in results(tmp_path).values()} == {"done"}
    assert "Restored all states from the checkpoint" in (tmp_path / "0" / "output.log").read_text()
    killed, whole = (
        torch.load(tmp_path / job / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for job in ("0", "1")
    )
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


def test_a_cluster_gets_what_the_file_says(root, tmp_path, monkeypatch):
    import submitit
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    config = OmegaConf.load(root / "conf" / "hydra" / "launcher" / "lightning_prune" / "submitit_slurm.yaml")
    more = {"name": "train", "submitit_folder": str(tmp_path), "slurm_partition": "gpu", "mem_gb": 7}
    launcher = instantiate(OmegaConf.merge(config, more))
    executor = submitit.AutoExecutor(folder=tmp_path, cluster=launcher.cluster)
    executor.update_parameters(**launcher.parameters)
    text = executor._executor._make_submission_file_text("python", "1")
    wanted = ("--partition=gpu", "--mem=7GB", "--cpus-per-task=1", "--time=60", "--job-name=train")
    assert [line for line in wanted if f"#SBATCH {line}\n" not in text] == []


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_ctrl_c_ends_all_processes_and_keeps_what_is_done(root, subprocess_env, tmp_path, launcher):
    choices = ["trainer.max_epochs=1,100000", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}"]
    process = start(root, subprocess_env, *SMALL, *QUIET, "model=mlp", "pruning=gradual", *choices)
    try:
        wait_for((tmp_path / "0" / "metrics.json").is_file, process)
        wait_for((tmp_path / "1" / "checkpoints" / "last.ckpt").is_file, process)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    if launcher == "joblib":  # what submitit starts says that it was interrupted
        assert "Traceback" not in errors
    assert "the rest: " in output and (tmp_path / "sweep.html").is_file()
    rows = results(tmp_path)
    assert rows["0"]["status"] == "done"
    assert rows["1"]["status"] in {"joblib": ["stopped"], "submitit_local": ["stopped", "running"]}[launcher]
    end = time.monotonic() + 60
    while is_alive(pid_of(tmp_path / "1")):
        assert time.monotonic() < end, "a job outlives its sweep"
        time.sleep(0.2)


def test_a_search_goes_on_and_learns_from_what_is_there(root, subprocess_env, tmp_path):
    search = [
        "hydra/sweeper=optuna",
        "pruning=gradual",
        "hydra/launcher=joblib",
        f"hydra.sweep.dir={tmp_path}",
    ]
    first = run(root, subprocess_env, *search, *TINY, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2")
    assert first.returncode == 0, first.stderr
    before = results(tmp_path)
    assert len(before) == 2 and all(0.5 <= float(row["pruning.sparsity"]) <= 0.98 for row in before.values())
    (tmp_path / "1" / "metrics.json").unlink()  # as if it had been interrupted
    more = run(root, subprocess_env, *search, *TINY, "hydra.sweeper.n_trials=3", "resume=true")
    assert more.returncode == 0, more.stderr
    after = results(tmp_path)
    assert {job: row["status"] for job, row in after.items()} == {"0": "done", "1": "done", "2": "done"}
    assert after["1"]["pruning.sparsity"] == before["1"]["pruning.sparsity"]
    assert "recommended: " in more.stdout and (tmp_path / "sweep.html").is_file()
    assert set(sweep.read_jobs(tmp_path)[0]) >= {"pruning/scope", "pruning/schedule", "pruning/criterion"}
