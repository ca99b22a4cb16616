"""The guides, as a new user follows them: from the built wheel, in a fresh environment, outside of the checkout.

Each block with a title is a file, and each command runs as it is written; only `pip install` is done before.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import GUIDES as MORE
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
GUIDES = ROOT / "docs" / "guides"
NEEDS = {
    "lightning-module": (),
    "hydra-template": ("sklearn", "hydra_plugins.hydra_joblib_launcher", "submitit", "optuna"),
    "transformers": ("transformers",),
    "torchvision-timm": (),
    "lightning-cli": ("jsonargparse", "sklearn"),
    "plain-pytorch": (),
    "loggers": ("wandb", "tensorboard", "sklearn"),
}
RESNET = '''
"""Stands in for torchvision, whose builds do not fit each build of torch: a network of the same names and interface."""
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.layer1, self.layer2 = nn.Conv2d(3, 64, 7, 4), Block(64), Block(64)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(64, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(self.conv1(x)))), 1))


def resnet18(num_classes=1000):
    return ResNet(num_classes)
'''


def files_of(text: str) -> dict[str, str]:
    return dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', text, flags=re.DOTALL))


def commands_of(text: str) -> list[str]:
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    return [line for line in lines if not line.startswith("pip install ")]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a fresh environment: the wheel, and the packages that this one has, but not the checkout."""
    folder = tmp_path_factory.mktemp("fresh")
    quiet = ["--no-deps", "--no-index", "-q"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", str(ROOT), "-w", str(folder), "--no-build-isolation", *quiet], check=True, cwd=folder
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", str(wheel), "--target", str(site), *quiet], check=True, cwd=folder)
    known = [path for path in sys.path if path.endswith("site-packages")]
    known += [str(MORE)] if MORE.is_dir() else []
    (site / "base.pth").write_text("".join(f"import sys; sys.path.append({path!r})\n" for path in known))
    return folder / "venv" / "bin" / "python"


def run(command: str, python: Path, folder: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env = {
        **kept,
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
    }
    program, *arguments = shlex.split(command)
    assert program == "python"
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("guide", NEEDS)
def test_a_guide_works_as_it_is_written(guide, python, tmp_path):
    for package in NEEDS[guide]:
        if find_spec(package) is None:
            pytest.skip(f"no {package}: .ci/run installs it")
    text = (GUIDES / f"{guide}.md").read_text(encoding="utf-8")
    for name, content in files_of(text).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    if guide == "torchvision-timm":
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").touch()
        (tmp_path / "torchvision" / "models.py").write_text(RESNET)
    where = run("python -c 'import lightning_prune; print(lightning_prune.__file__)'", python, tmp_path)
    assert str(ROOT) not in where and "fresh" in where
    commands = commands_of(text)
    assert commands
    for command in commands:
        run(command, python, tmp_path)


def test_every_guide_of_a_project_is_tested():
    with_files = {path.stem for path in GUIDES.glob("*.md") if files_of(path.read_text(encoding="utf-8"))}
    assert with_files == set(NEEDS)
