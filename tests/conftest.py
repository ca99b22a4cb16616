"""What all tests share: one thread per process, and no trace of one test's global state in the next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ROOT.parent / "shared" / "data"))

if str(ROOT) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))
GUIDES = ROOT / ".ci" / "guides"
"""Packages that only guides need, as transformers; `.ci/run` installs them. Theirs come after the environment's own."""
sys.path += [str(GUIDES)] if GUIDES.is_dir() else []
torch.set_num_threads(1)
settings.register_profile("project", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("project")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with MNIST and the texts, which is no part of the project."""
    if not (DATA / "mnist.npz").is_file():
        pytest.skip(
            "no data folder: set LIGHTNING_PRUNE_DATA to one that holds mnist.npz and tinyshakespeare.txt"
        )
    return DATA


@pytest.fixture(scope="session")
def subprocess_env() -> dict[str, str]:
    """An environment in which the checkout is importable, with one thread and without a terminal's colours."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
