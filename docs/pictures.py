"""Draws the pictures of the pages from real runs on a CPU: `python docs/pictures.py [name ...]`, about two minutes.

Each function of `drawing` that is listed here returns a figure, and is named as its file in `docs/pictures`. Networks
are trained, pruned and traced; nothing is made up but the words of the labels.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from drawing import nouns, runs, structure
from drawing.base import STYLE

FOLDER = ROOT / "docs" / "pictures"

PICTURES: dict[str, Callable[[], Figure]] = {
    function.__name__: function
    for function in (
        *(nouns.schedules, nouns.window, nouns.granularities, nouns.scopes, nouns.masking, nouns.solvers),
        *(runs.ramp, runs.learning_rate, runs.step, structure.shrinking, structure.groups),
    )
}
RASTER = ("granularities",)
"""Pictures of many small squares, which are smaller as pixels."""


def file_of(name: str) -> Path:
    """Return where a picture lies."""
    return FOLDER / f"{name}.{'png' if name in RASTER else 'svg'}"


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draw a picture into a folder."""
    path = folder / file_of(name).name
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
        PICTURES[name]().savefig(path, **options)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for chosen in sys.argv[1:] or PICTURES:
        print(draw(chosen).relative_to(ROOT))
