"""The built wheel, in a Hydra application that knows nothing of this checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

APP = """
import sys
import hydra
from hydra.utils import instantiate

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    assert "torch" not in sys.modules
    callback = instantiate(cfg.callbacks.pruning)
    import lightning_prune
    print("from", lightning_prune.__file__)
    print(type(callback).__name__, callback.recipe.sparsity, callback.schedule, cfg.mine)

main()
"""


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    command = [sys.executable, "-m", "pip", "wheel", str(root), "-w", str(folder), *options]
    subprocess.run(command, check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel):
    """A folder with the wheel's content, as an installation has it."""
    folder = wheel.parent / "site"
    options = ["--no-deps", "--no-index", "-q", "--target", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", str(wheel), *options], check=True, cwd=wheel.parent
    )
    return folder


def run_app(site: Path, folder: Path, env: dict[str, str], *overrides: str):
    (folder / "app.py").write_text(APP)
    (folder / "app.yaml").write_text("mine: 3\n")
    return subprocess.run(
        [sys.executable, "app.py", *overrides],
        cwd=folder,
        env={**env, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_holds_the_recipes_and_nothing_of_the_checkout(root, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {str(path.relative_to(root)) for path in (root / "conf" / "pruning").glob("**/*.yaml")}
    assert {f"lightning_prune/{recipe}" for recipe in recipes} <= names
    sweeps = {
        str(path.relative_to(root)) for path in (root / "conf" / "hydra").glob("*/lightning_prune/*.yaml")
    }
    assert len(sweeps) == 6
    held = {name for name in names if name.startswith("lightning_prune/conf/")}
    assert held == {f"lightning_prune/{file}" for file in recipes | sweeps}
    assert "hydra_plugins/lightning_prune/__init__.py" in names
    assert "hydra_plugins/__init__.py" not in names, "it is a namespace that others share"
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "lightning_prune",
        "hydra_plugins",
    }


def test_recipes_work_in_a_foreign_application(site, subprocess_env, tmp_path):
    overrides = ["+pruning=global_unstructured", "pruning/schedule=linear", "pruning.sparsity=0.75"]
    done = run_app(site, tmp_path, subprocess_env, *overrides)
    assert done.returncode == 0, done.stderr
    assert "TrainTimePruning 0.75 Linear() 3" in done.stdout
    assert f"from {site}" in done.stdout


def test_mistakes_are_refused_in_a_foreign_application(site, subprocess_env, tmp_path):
    done = run_app(site, tmp_path, subprocess_env, "+pruning=global_unstructured", "pruning.sparsty=0.75")
    assert done.returncode == 1
    assert "Key 'sparsty' not in 'TrainTimePruning'" in done.stderr


def test_launchers_and_sweepers_travel_and_leave_those_of_hydra_alone(site, subprocess_env, tmp_path):
    ours = ["hydra/launcher=lightning_prune/joblib", "hydra/sweeper=lightning_prune/optuna"]
    done = run_app(
        site, tmp_path, subprocess_env, *ours, "hydra/callbacks=lightning_prune/sweep", "--cfg=hydra"
    )
    assert done.returncode == 0, done.stderr
    for name in ("launchers.JoblibLauncher", "optuna_sweeper.OptunaSweeper"):
        assert f"_target_: hydra_plugins.lightning_prune.{name}" in done.stdout
    assert "_target_: lightning_prune.sweep.SweepReport" in done.stdout
    if find_spec("hydra_plugins.hydra_joblib_launcher"):
        theirs = run_app(site, tmp_path, subprocess_env, "hydra/launcher=joblib", "--cfg=hydra")
        assert "_target_: hydra_plugins.hydra_joblib_launcher.joblib_launcher" in theirs.stdout, theirs.stderr


def test_what_pages_are_made_of_travels_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = ("page.css", "page.js", "chart.umd.min.js", "chart.LICENSE.md")
    assert {f"lightning_prune/report/page/assets/{name}" for name in assets} <= names
