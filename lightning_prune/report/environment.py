"""Where a run took place: versions, processor, threads, seed."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata

PACKAGES = ("lightning-prune", "lightning", "torch", "torchmetrics", "hydra-core")
SEED_VARIABLE = "PL_GLOBAL_SEED"  # set by lightning's `seed_everything`


def environment() -> dict[str, str]:
    """Return versions, machine, number of threads and seed by name; what is not known is left out.

    Example:
        >>> "python" in environment()
        True
    """
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    found = {
        "written": now,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if (torch := sys.modules.get("torch")) is not None:
        found["torch threads"] = str(torch.get_num_threads())
    if seed := os.environ.get(SEED_VARIABLE):
        found["seed"] = seed
    return found
