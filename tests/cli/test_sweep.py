from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_prune import sweep
from tests.hydra_runs import QUIET, SMALL


def write_job(folder, number, overrides, metrics=None, error=None):
    job = folder / str(number)
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    if metrics is not None:
        (job / "metrics.json").write_text(json.dumps(metrics))
    if error is not None:
        (job / "error.txt").write_text(error)


@pytest.fixture
def folder(tmp_path):
    write_job(tmp_path, 0, ["pruning=erk", "+seed=1"], {"test/acc": 0.8, "test/loss": 0.5, "sparsity": 0.9})
    write_job(tmp_path, 1, ["pruning=lamp", "+seed=1"], {"test/acc": 0.9, "test/loss": 0.6, "sparsity": 0.9})
    write_job(tmp_path, 2, ["pruning=none", "+seed=1"], error="ValueError: `x` is [0, 1]\nmore")
    write_job(tmp_path, 10, ["pruning=rows", "+seed=1"])
    return tmp_path


def test_rows_are_sorted_by_the_metric_and_jobs_without_it_come_last(folder):
    assert [row["job"] for row in sweep.report(folder)] == ["1", "0", "2", "10"]
    assert [row["job"] for row in sweep.report(folder, "test/loss")] == ["0", "1", "2", "10"]
    assert [row["pruning"] for row in sweep.report(folder, "pruning")] == ["erk", "lamp", "none", "rows"]


def test_the_csv_holds_every_job_and_every_column(folder):
    sweep.report(folder)
    with (folder / "results.csv").open() as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"0", "1", "2", "10"}
    assert rows["1"]["test/acc"] == "0.9"
    assert rows["1"]["seed"] == "1"
    assert [rows[job]["status"] for job in ("0", "2", "10")] == ["done", "failed", "unfinished"]
    assert "`x` is [0, 1]" in rows["2"]["error"]


def test_the_terminal_shows_what_differs_and_what_went_wrong(folder, capsys):
    sweep.main([str(folder)])
    shown = capsys.readouterr().out
    assert "pruning" in shown
    assert "seed" not in shown
    assert "test/loss" not in shown
    assert "job 2 failed: ValueError: `x` is [0, 1]" in shown
    assert str(folder / "results.csv") in shown


def test_a_folder_without_jobs_and_an_unknown_column_are_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="`sort_by` is one of .*'test/acc'.*, but got 'acc'"):
        sweep.report(folder, "acc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        sweep.main([str(tmp_path / "empty")])
    assert "`folder` is one of a Hydra multirun" in capsys.readouterr().err


def test_only_the_first_process_reports(folder, monkeypatch):
    from omegaconf import OmegaConf

    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    table = sweep.SweepTable()
    monkeypatch.setenv("LOCAL_RANK", "1")
    table.on_multirun_start(config)
    table.on_multirun_end(config)
    assert not (folder / "results.csv").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    table.on_multirun_start(config)
    table.on_multirun_end(config)
    assert (folder / "results.csv").exists()


def test_a_sweep_ends_with_one_table_although_a_job_fails(root, subprocess_env, tmp_path):
    overrides = ["pruning=local_unstructured,global_unstructured", "pruning.sparsity=0.5,1.5"]
    command = [sys.executable, "train.py", "-m", *overrides, *SMALL, *QUIET, f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, cwd=root, env=subprocess_env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    assert {row["pruning"] for row in rows} == {"local_unstructured", "global_unstructured"}
    assert float(rows[0]["test/acc"]) >= float(rows[1]["test/acc"])
    assert float(rows[0]["sparsity"]) == pytest.approx(0.5, abs=0.01)
    assert done.stdout.count("all columns:") == 1
    assert "but got 1.5" in done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_a_run_at_once_and_in_order(root, subprocess_env, tmp_path):
    command = [
        sys.executable,
        "train.py",
        "pruning=gradual",
        "trainer=cpu",
        "trainer.max_epochs=100000",
        *QUIET,
    ]
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        [*command, f"hydra.run.dir={tmp_path}"],
        cwd=root,
        env=subprocess_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while process.poll() is None and not checkpoint.is_file():
            time.sleep(0.2)
        output = None
        for _ in range(
            3
        ):  # seen once on a loaded machine: an interrupt was lost, and a user would press again
            os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=30)
                break
    finally:
        process.kill()
    assert process.returncode == 1
    assert output is not None and b"Traceback" not in output
    assert checkpoint.is_file()
