"""What the benchmarks share: facts of a run, medians and quartiles, plain tables, dated results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
COMPARED = (
    "torch",
    "lightning",
    "torchvision",
    "timm",
    "transformers",
    "torch-pruning",
    "torch-kirigami",
    "fasterai",
)


def facts(seed: int | Sequence[int]) -> dict[str, Any]:
    """Return when, how and with what a run was made; of the machine only what says how to read its figures."""
    installed = {found.name.lower(): found.version for found in metadata.distributions()}
    versions = {name: installed[name] for name in COMPARED if name in installed}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "seed": seed,
        "versions": {"python": platform.python_version()} | versions,
        "machine": {
            "cores": os.cpu_count(),
            "architecture": platform.machine(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": 1,
        },
    }


def revision() -> str:
    """Return the commit that runs, with a + where the working tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "lightning_prune") else ""
    )


def now(device: str) -> float:
    """Return CPU seconds, or of a GPU, when it is done with all, those on the clock."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[key] for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, record: dict[str, Any]) -> Path:
    """Write a run's record to `benchmarks/results`, under its name and time."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['date'][:19].replace(':', '')}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
