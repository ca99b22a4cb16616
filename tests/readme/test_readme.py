"""The README's commands and examples, executed in its order; only runs are made shorter."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lightning_prune.sweep.__main__ import main
from tests.conftest import DATA, ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDS_DATA = ("mnist", "tinyshakespeare", "wikitext2")
SHORTER = ("trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
SMALL_GPT = ["model.width=32", "model.num_layers=1", "data.batch_size=8"]
FEWER = ("+trainer.limit_train_batches=10", "+trainer.limit_val_batches=2", "+trainer.limit_test_batches=2")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [
        line
        for line in lines
        if re.match(r"python (train|plan|eval|export|sensitivity|-m lightning_prune)", line)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def shortened(command: str) -> list[str]:
    """The script and its arguments, with a run of one short epoch."""
    _, script, *overrides = command.split()
    more = {
        "train.py": [*SHORTER, *FEWER, "callbacks.monitor.latency=false"],
        "plan.py": [*SHORTER, *FEWER],
        "export.py": [],  # it has no trainer
    }.get(script, list(SHORTER[1:]))
    small = SMALL_GPT if "model=gpt" in overrides else []
    return [
        str(ROOT / script),
        *overrides,
        *more,
        *small,
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


def run_apart(command: str, folder: Path, env: dict[str, str]) -> None:
    """A sweep whose jobs have processes of their own."""
    words = [sys.executable, *shortened(command)]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (wanted,) = re.findall(r"hydra.sweep.dir=(\S+)", command)
    assert f"also: {wanted}/sweep.html" in done.stdout
    assert "recommended: " in done.stdout


def test_there_are_commands_and_examples():
    assert len(commands()) >= 8
    assert len(blocks("python")) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, folder, monkeypatch, capsys, subprocess_env):
    if any(name in command for name in NEEDS_DATA) and not (DATA / "mnist.npz").is_file():
        pytest.skip("no data folder: set LIGHTNING_PRUNE_DATA")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LIGHTNING_PRUNE_DATA", str(DATA))
    if "export.py" in command:
        pytest.importorskip("onnxscript", reason="an environment from before `export`: install it anew")
    if command.startswith("python -m lightning_prune.sweep "):
        main(command.split()[3:])
        assert f"all columns: {command.split()[3]}/sweep.csv" in capsys.readouterr().out
        return
    if " hydra/launcher=" in command:
        run_apart(command, folder, subprocess_env)
        return
    monkeypatch.setattr(sys, "argv", shortened(command))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        runpy.run_path(sys.argv[0], run_name="__main__")
    shown = capsys.readouterr().out
    script = command.split()[1]
    told = {
        "plan.py": "nothing stands against it",
        "export.py": "difference of outputs",
        "sensitivity.py": "allocated",
    }
    assert told.get(script, "test/") in shown
    assert "run folder: " in shown or script in ("plan.py", "sensitivity.py")


def test_every_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="an environment from before `export`: install it anew")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks("python"):
            code = block.replace(
                "max_epochs=10", "max_epochs=1, enable_progress_bar=False, accelerator='cpu'"
            )
            exec(compile(code, "README.md", "exec"), namespace)
    assert list(tmp_path.glob("**/report.json"))
    assert namespace["metrics"]["val/acc"] > 0


def test_the_plain_lines_are_what_make_does():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    plain = next(block for block in blocks("bash") if "-m venv" in block)
    for target in ("demo", "test"):
        printed = subprocess.run(
            ["make", "--no-print-directory", "-n", "-B", target],  # which it prints where make runs the tests
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for line in printed.stdout.splitlines():
            if not line.startswith("touch"):
                wanted = line.replace("python3 -m venv", "python -m venv").replace("install -q", "install")
                assert wanted in plain


def test_the_tables_name_every_recipe_and_every_noun():
    from lightning_prune import config

    recipes = {path.stem for path in (ROOT / "conf" / "pruning").glob("*.yaml")}
    assert {name for name in recipes if f"`{name}`" not in TEXT} == set()
    nouns = {name for axis in config.AXES if axis != "window" for name in config.nouns(axis)}
    assert {name for name in nouns if f"`{name}`" not in TEXT} == set()


def test_every_file_that_is_linked_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert Path(ROOT / target).exists(), target
