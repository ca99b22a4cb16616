from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from lightning_prune import sweep
from lightning_prune.report import storage
from lightning_prune.report.costs import Cost
from lightning_prune.report.data import Report
from lightning_prune.sweep.__main__ import main
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


METRIC_NAMES = [("val_acc", 2), ("valid/accuracy", 2), ("val_loss", 1), ("val/loss/dataloader_idx_0", 1)]


@pytest.mark.parametrize(("name", "best"), METRIC_NAMES)
def test_metrics_are_known_by_the_names_that_people_give_them(tmp_path, name, best, capsys):
    for job, value in ((1, 0.5), (2, 0.9)):
        write_job(tmp_path, job, [f"x={job}"], {name: value, "nonzeros": 10.0 * job, "train_acc": 1.0})
    main([str(tmp_path)])
    assert f"recommended: x={best} ({name}" in capsys.readouterr().out
    assert (tmp_path / "sweep.html").is_file() and (tmp_path / "sweep.png").is_file()


def test_where_no_metric_is_known_the_report_says_how_to_name_one(tmp_path, capsys):
    for job, value in ((1, 0.5), (2, 0.9)):
        write_job(tmp_path, job, [f"x={job}"], {"elegance": value, "nonzeros": 10.0 * job})
    main([str(tmp_path)])
    assert "Name one with `metric`, of ['elegance', 'nonzeros']" in capsys.readouterr().out
    assert (tmp_path / "sweep.html").is_file()
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--metric", "elegance"])
    assert "`mode` is 'min' or 'max', what is better of 'elegance'" in capsys.readouterr().err
    main([str(tmp_path), "--metric", "elegance", "--mode", "min"])
    assert "recommended: x=1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`mode`"):
        sweep.SweepReport(metric="elegance")


def test_the_csv_holds_every_job_and_every_column(folder):
    sweep.report(folder)
    with (folder / "sweep.csv").open() as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"0", "1", "2", "10"}
    assert rows["1"]["test/acc"] == "0.9"
    assert rows["1"]["seed"] == "1"
    assert [rows[job]["status"] for job in ("0", "2", "10")] == ["done", "failed", "unfinished"]
    assert "`x` is [0, 1]" in rows["2"]["error"]


def test_the_terminal_shows_what_differs_and_what_went_wrong(folder, capsys):
    main([str(folder)])
    shown = capsys.readouterr().out
    assert "pruning" in shown
    assert "seed" not in shown
    assert "test/loss" not in shown
    assert "job 2 failed: ValueError: `x` is [0, 1]" in shown
    assert str(folder / "sweep.csv") in shown


def test_a_folder_without_jobs_and_an_unknown_column_are_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="`sort_by` is one of .*'test/acc'.*, but got 'acc'"):
        sweep.report(folder, "acc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "empty")])
    assert "`folder` is one of a Hydra multirun" in capsys.readouterr().err


def test_only_the_first_process_reports(folder, monkeypatch):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    table = sweep.SweepReport()
    monkeypatch.setenv("LOCAL_RANK", "1")
    table.on_multirun_start(config)
    table.on_multirun_end(config)
    assert not (folder / "sweep.csv").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    table.on_multirun_start(config)
    table.on_multirun_end(config)
    assert (folder / "sweep.csv").exists()


def test_a_sweep_ends_with_one_table_although_a_job_fails(root, subprocess_env, tmp_path):
    overrides = ["pruning=local_unstructured,global_unstructured", "pruning.sparsity=0.5,1.5"]
    command = [sys.executable, "train.py", "-m", *overrides, *SMALL, *QUIET, f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, cwd=root, env=subprocess_env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    assert {row["pruning"] for row in rows} == {"local_unstructured", "global_unstructured"}
    assert float(rows[0]["test/acc"]) >= float(rows[1]["test/acc"])
    assert float(rows[0]["sparsity"]) == pytest.approx(0.5, abs=0.01)
    assert done.stdout.count("all columns:") == 1
    assert "but got 1.5" in done.stdout
    assert "2 of 4 jobs failed" in done.stderr


def test_the_status_says_how_far_a_job_is(folder):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name, host, pid in (
        ("20", socket.gethostname(), os.getpid()),
        ("21", socket.gethostname(), gone.pid),
        ("22", "elsewhere", 1),
    ):
        write_job(folder, name, ["pruning=set"])
        (folder / name / "job.json").write_text(json.dumps({"host": host, "pid": pid}))
    note = {
        "jobs": {"0": ["pruning=erk"], "23": ["pruning=set", "resume=true"]},
        "command": ["python", "x.py"],
    }
    (folder / "sweep.json").write_text(json.dumps(note))
    found = {row["job"]: row["status"] for row in sweep.read_jobs(folder)}
    assert found["20"] == "running"
    assert found["21"] == "stopped"
    assert found["22"] == found["10"] == "unfinished"
    assert found["23"] == "missing"


def test_the_report_says_how_to_finish_the_rest(folder, capsys):
    command = [
        "python",
        "train.py",
        "-m",
        "a=1,2",
        "hydra.sweep.dir=old",
        "resume=true",
        "logger.api_key=secret",
    ]
    (folder / "sweep.json").write_text(json.dumps({"command": command, "jobs": {}}))
    main([str(folder)])
    shown = capsys.readouterr().out
    assert (
        f"the rest: python train.py -m a=1,2 'logger.api_key=***' hydra.sweep.dir={folder} resume=true"
        in shown
    )
    assert "secret" not in shown


def test_seeds_are_put_together(tmp_path, capsys):
    for i, (sparsity, seed, acc) in enumerate(((0.5, 0, 0.9), (0.5, 1, 0.8), (0.9, 0, 0.7), (0.9, 1, 0.7))):
        metrics = {"val/acc": acc, "nonzeros": 1000 * (1 - sparsity), "sparsity": sparsity}
        write_job(tmp_path, i, [f"pruning.sparsity={sparsity}", f"seed={seed}"], metrics)
    main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "0.8500 ± 0.0707" in shown
    with (tmp_path / "sweep_means.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["jobs"] for row in rows] == ["0 1", "2 3"]
    assert float(rows[0]["val/acc sd"]) == pytest.approx(0.0707, abs=1e-4)
    assert "recommended: pruning.sparsity=0.5" in shown
    assert {path.name for path in tmp_path.glob("sweep*")} == {
        "sweep.csv",
        "sweep_means.csv",
        "sweep.png",
        "sweep.html",
    }


def test_without_matplotlib_only_the_picture_is_left_out(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for number, params in ((0, 100.0), (1, 200.0)):
        path = folder / str(number) / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "params": params}))
    main([str(folder)])
    assert 'pip install "lightning-prune[plots]"' in capsys.readouterr().out
    assert (folder / "sweep.html").is_file()
    assert not (folder / "sweep.png").exists()


def test_what_a_job_of_any_application_returns_is_its_row(tmp_path):
    from hydra.core.utils import JobReturn, JobStatus

    report = sweep.SweepReport()
    for name, result in (("0", 0.5), ("1", {"val/acc": 0.25, "name": "x"})):
        folder = tmp_path / name
        write_job(tmp_path, name, ["lr=1"])
        config = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(folder)}}})
        report.on_job_end(config, JobReturn(status=JobStatus.COMPLETED, _return_value=result))
    rows = sweep.read_jobs(tmp_path)
    assert [row.get("result") for row in rows] == [0.5, None]
    assert rows[1]["val/acc"] == 0.25 and "name" not in rows[1]


def test_what_a_run_in_any_application_reports_is_its_row_and_one_number_goes_by_its_name(tmp_path):
    from hydra.core.utils import JobReturn, JobStatus

    write_job(tmp_path, 0, ["lr=1"])
    cost = Cost(params=10, nonzeros=4)
    report = Report("train_time", achieved_sparsity=0.6, cost_after=cost, metrics_after={"val/acc": 0.25})
    storage.save(report, tmp_path / "0" / "version_0" / "report.json")
    config = {"hydra": {"runtime": {"output_dir": str(tmp_path / "0")}}, "optimized_metric": "test/acc"}
    done = JobReturn(status=JobStatus.COMPLETED, _return_value=0.5)
    sweep.SweepReport().on_job_end(OmegaConf.create(config), done)
    (row,) = sweep.read_jobs(tmp_path)
    found = {name: row[name] for name in ("sparsity", "params", "nonzeros", "val/acc", "test/acc")}
    assert found == {"sparsity": 0.6, "params": 10.0, "nonzeros": 4.0, "val/acc": 0.25, "test/acc": 0.5}


def test_a_tolerance_below_zero_is_refused_at_once():
    with pytest.raises(ValueError, match="`tolerance` is what may be lost, 0 or more, but got -0.1"):
        sweep.SweepReport(tolerance=-0.1)
