"""What is run, where, and what is left alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException

from hydra_plugins.lightning_prune import sweepers
from lightning_prune.sweep import notes
from tests.hydra_runs import QUIET, SMALL
from tests.sweep.test_summary import write_job

TINY = (*SMALL, *QUIET, "model=mlp", "trainer.max_epochs=1")


def run(root, env, *arguments, timeout=300):
    command = [sys.executable, "train.py", "-m", *arguments]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=timeout)


def results(folder):
    return {row["job"]: row for row in notes_rows(folder)}


def notes_rows(folder):
    from lightning_prune.sweep import read_jobs

    return read_jobs(folder)


def test_jobs_keep_their_folders_whatever_the_order_of_the_choices(tmp_path):
    write_job(tmp_path, 0, ["a=1", "b=1"], {"val/acc": 1.0})
    write_job(tmp_path, 1, ["a=2", "b=1", "resume=true"])
    jobs = [["b=1", "a=1"], ["b=2", "a=1"], ["b=1", "a=2"], ["b=2", "a=2"]]
    placed, waiting = sweepers.placed_jobs(tmp_path, jobs)
    assert placed == {"0": ["b=1", "a=1"], "2": ["b=2", "a=1"], "1": ["b=1", "a=2"], "3": ["b=2", "a=2"]}
    assert waiting == ["2", "1", "3"]


def test_what_was_planned_keeps_its_folder_too(tmp_path):
    notes.note_sweep(tmp_path, ["python"], {"0": ["a=1"], "5": ["a=2"]}, 2)
    placed, _ = sweepers.placed_jobs(tmp_path, [["a=3"], ["a=2"], ["a=2"]])
    assert placed == {"1": ["a=3"], "5": ["a=2"], "2": ["a=2"]}


def test_failed_jobs_are_answered_in_one_line(tmp_path):
    done = JobReturn(status=JobStatus.COMPLETED, _return_value=1.0)
    failed = JobReturn(status=JobStatus.FAILED, _return_value=ValueError("x"))
    sweepers.check_all_done(tmp_path, [done, done])
    with pytest.raises(CompactHydraException, match="1 of 2 jobs failed, see the table"):
        sweepers.check_all_done(tmp_path, [done, failed])


def test_a_job_that_is_done_is_not_run_again_and_another_is_refused(tmp_path):
    notes.start_job(tmp_path, ["a=1", "hydra.sweep.subdir=0"])
    assert notes.finished(tmp_path, ["a=1", "resume=true"]) is None
    (tmp_path / "metrics.json").write_text(json.dumps({"val/acc": 0.5}))
    notes.start_job(tmp_path, ["resume=true", "a=1"], resume=True)
    assert notes.finished(tmp_path, ["resume=true", "a=1"]) == {"val/acc": 0.5}
    with pytest.raises(
        ValueError, match=r"`resume` goes on with the same settings, but .* holds a run of a=1, and got a=2"
    ):
        notes.finished(tmp_path, ["a=2"])
    notes.start_job(tmp_path, ["a=2"])
    assert not (tmp_path / "metrics.json").exists()


def test_the_command_of_a_job_is_that_of_a_single_run(tmp_path, monkeypatch):
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict, read_write

    from lightning_prune.sweep.processes import as_a_run_of_its_own
    from tests.hydra_runs import composed

    composed("pruning=erk", output_dir=tmp_path)
    given = [
        "x.py",
        "-m",
        "--config-name=train",
        "pruning=erk,lamp",
        "hydra.sweep.dir=y",
        "hydra/job_logging=none",
    ]
    monkeypatch.setattr(sys, "argv", given)
    hydra = HydraConfig.get()
    with read_write(hydra), open_dict(hydra):
        hydra.mode = RunMode.MULTIRUN
        hydra.overrides.task = ["pruning=erk"]
        hydra.overrides.hydra = [
            "hydra.mode=MULTIRUN",
            "hydra.sweep.dir=y",
            "hydra.sweep.subdir=0",
            "hydra/job_logging=none",
        ]
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with as_a_run_of_its_own():
        assert sys.argv == ["x.py", "--config-name=train", "pruning=erk", "hydra/job_logging=none"]
        assert HydraConfig.get().run.dir == str(tmp_path)
        monkeypatch.setenv("MASTER_PORT", "1")
    assert sys.argv == given
    import os

    assert "MASTER_PORT" not in os.environ
    assert OmegaConf.is_config(HydraConfig.get())


def test_only_the_first_process_starts_a_sweep(root, subprocess_env, tmp_path):
    done = run(
        root, {**subprocess_env, "LOCAL_RANK": "1"}, "seed=0,1", f"hydra.sweep.dir={tmp_path}", timeout=100
    )
    assert done.returncode == 1
    assert "a sweep is started by the first process alone" in done.stderr
    assert not list(tmp_path.iterdir())


def test_folders_of_other_names_are_refused(root, subprocess_env, tmp_path):
    names = ["hydra.sweep.subdir='${hydra.job.override_dirname}'", f"hydra.sweep.dir={tmp_path}"]
    done = run(root, subprocess_env, "seed=0,1", *names, timeout=100)
    assert done.returncode == 1
    assert "`hydra.sweep.subdir` is ${hydra.job.num}, by which a sweep finds its jobs again" in done.stderr


@pytest.mark.slow
def test_a_sweep_goes_on_with_what_is_missing_and_what_is_new(root, subprocess_env, tmp_path):
    folder = f"hydra.sweep.dir={tmp_path}"
    done = run(root, subprocess_env, "pruning=gradual", "pruning.sparsity=0.5,0.9", *TINY, folder)
    assert done.returncode == 0, done.stderr
    assert "sweep: 2 of 2 jobs done; best val/acc" in done.stdout
    before = {job: (tmp_path / job / "metrics.json").stat().st_mtime_ns for job in ("0", "1")}
    (tmp_path / "1" / "metrics.json").unlink()

    again = run(root, subprocess_env, "pruning=gradual", "pruning.sparsity=0.5,0.9", *TINY, folder)
    assert again.returncode == 1
    assert "`hydra.sweep.dir` is a new folder" in again.stderr and "resume=true" in again.stderr
    assert "1" in {row["job"] for row in notes_rows(tmp_path) if row["status"] != "done"}

    more = run(
        root,
        subprocess_env,
        "pruning=gradual",
        "seed=0",
        "pruning.sparsity=0.7,0.9,0.5",
        *TINY,
        folder,
        "resume=true",
    )
    assert more.returncode == 0, (
        more.stderr
    )  # seed=0 is a setting that the first jobs did not name: all are new
    assert {row["status"] for row in notes_rows(tmp_path)} == {"done", "stopped"}

    last = run(
        root, subprocess_env, "pruning.sparsity=0.9,0.5,0.7", "pruning=gradual", *TINY, folder, "resume=true"
    )
    assert last.returncode == 0, last.stderr
    rows = results(tmp_path)
    assert {row["status"] for row in rows.values()} == {"done"}
    assert rows["1"]["pruning.sparsity"] == "0.9" and len(rows) == 6
    assert (tmp_path / "0" / "metrics.json").stat().st_mtime_ns == before["0"], "job 0 was run again"
    assert (tmp_path / "1" / "metrics.json").stat().st_mtime_ns != before["1"]


@pytest.mark.slow
def test_each_job_of_a_sweep_has_its_own_group_of_processes(root, subprocess_env, tmp_path):
    overrides = ["trainer=ddp_sim", "pruning=gradual", "pruning.sparsity=0.5,0.9"]
    small = [o for o in TINY if o != "trainer=cpu"]
    done = run(root, subprocess_env, *overrides, *small, f"hydra.sweep.dir={tmp_path}", timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = results(tmp_path)
    assert {job: row["status"] for job, row in rows.items()} == {"0": "done", "1": "done"}
    assert [rows[job]["sparsity"] for job in ("0", "1")] == pytest.approx([0.5, 0.9], abs=0.01)
    assert done.stdout.count("GLOBAL_RANK: 1, MEMBER: 2/2") == 2, "one second process for each job"
    assert done.stdout.count("all columns:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["one_shot", "global_structured", "gradual"])
def test_a_run_that_stopped_after_its_last_epoch_is_finished(root, subprocess_env, tmp_path, recipe):
    """What comes after the last checkpoint, pruning among it, is done as if the run had never stopped."""
    command = [sys.executable, "train.py", f"pruning={recipe}", *TINY, f"hydra.run.dir={tmp_path}"]
    kept = ("sparsity", "params", "nonzeros", "macs", "val/acc", "val/loss", "test/acc", "test/loss")
    found = []
    for more in ([], ["resume=true"]):
        (tmp_path / "metrics.json").unlink(missing_ok=True)
        done = subprocess.run(
            [*command, *more], cwd=root, env=subprocess_env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        found.append({name: metrics[name] for name in kept})
    assert found[0] == found[1]
    known = subprocess.run(
        [*command, "resume=true"], cwd=root, env=subprocess_env, capture_output=True, text=True, timeout=100
    )
    assert "metrics, as they are" in known.stdout
