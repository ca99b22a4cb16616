"""What a sweep and its jobs write down, so that anyone can tell later what was to run and what came of it."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_prune.report.invocation import redacted_setting
from lightning_prune.report.storage import write_text

METRICS_FILE, ERROR_FILE, JOB_FILE, SWEEP_FILE = "metrics.json", "error.txt", "job.json", "sweep.json"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
OF_THE_SWEEP = ("hydra.", "hydra/", "resume=", "+resume=", "++resume=")
"""Overrides that say how a job is run, not what it is."""


def settings_of(overrides: Iterable[str]) -> tuple[str, ...]:
    """Return what a job is, of the overrides that it is run with: the same for the same job, in any order.

    Example:
        >>> settings_of(["seed=1", "pruning=erk", "resume=true", "hydra.sweep.subdir=3"])
        ('pruning=erk', 'seed=1')
    """
    return tuple(sorted(override for override in overrides if not override.startswith(OF_THE_SWEEP)))


def is_first_process() -> bool:
    """Whether this process reports: of those that train one model together, only the first does."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def start_job(folder: Path, overrides: Sequence[str], resume: bool = False) -> None:
    """Note who runs a job, and take away what an earlier try left; where that is to be kept, leave all as it is.

    Args:
        folder: of the job.
        overrides: that make it.
        resume: whether it goes on with what is there.
    """
    settings = list(settings_of(overrides))
    held = read_note(folder / JOB_FILE).get("settings", settings)
    if resume and (held != settings or (folder / METRICS_FILE).is_file()):
        return
    for name in (METRICS_FILE, ERROR_FILE):
        (folder / name).unlink(missing_ok=True)
    note = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "settings": settings}
    write_text(folder / JOB_FILE, json.dumps(note) + "\n")


def finished(folder: Path, overrides: Sequence[str]) -> dict[str, float] | None:
    """Return the metrics of a job that is to go on, if it has ended already.

    Raises:
        ValueError: the folder holds another job.
    """
    settings = list(settings_of(overrides))
    held = read_note(folder / JOB_FILE).get("settings", settings)
    if held != settings:
        raise ValueError(
            f"`resume` goes on with the same settings, but {folder} holds a run of {' '.join(held) or 'the defaults'}, "
            f"and got {' '.join(settings) or 'the defaults'}."
        )
    return read_note(folder / METRICS_FILE) or None


def note_error(folder: Path, error: BaseException | str) -> None:
    """Leave a note of what went wrong in the job's folder."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    write_text(folder / ERROR_FILE, text.strip() + "\n")


def read_note(path: Path) -> dict[str, Any]:
    """Return a note, empty if there is none (or it was cut short)."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def status_of(folder: Path) -> str:
    """Say how far a job has come.

    Returns:
        "done", "failed" (error.txt says why), "running", "stopped" (its process is gone), or "unfinished" where nobody
        noted who runs it, or another machine does.
    """
    if (folder / METRICS_FILE).is_file():
        return "done"
    if (folder / ERROR_FILE).is_file():
        return "failed"
    note = read_note(folder / JOB_FILE)
    if note.get("host") != socket.gethostname():
        return "unfinished"
    return "running" if _is_alive(int(note["pid"])) else "stopped"


def held_jobs(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the jobs that a sweep's folder holds, begun or only planned: name -> its settings, in their order.

    Raises:
        ValueError: one of them lies somewhere else, where nothing may be written for it.
    """
    planned = read_note(folder / SWEEP_FILE).get("jobs", {})
    held = {name: settings_of(overrides) for name, overrides in planned.items()}
    for note in folder.glob("*/.hydra/overrides.yaml"):
        held[note.parent.parent.name] = settings_of(overrides_in(note))
    for name in held:
        if (
            not name
            or Path(name).name != name
            or not (folder / name).resolve().is_relative_to(folder.resolve())
        ):
            raise ValueError(f"`jobs` of a sweep are folders in its own, {folder}, but got {name!r}.")
    return dict(sorted(held.items(), key=lambda item: natural(item[0])))


def overrides_in(note: Path) -> list[str]:
    """Return the overrides that Hydra has noted of a job; nothing in the note is run or resolved.

    Raises:
        ValueError: it is no list.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(note))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"{note} is Hydra's list of overrides, but got what cannot be read: {error}"
        ) from error
    if not isinstance(found, list):
        raise ValueError(f"{note} is Hydra's list of overrides, but got {type(found).__name__}.")
    return [str(override) for override in found]


def natural(name: str) -> tuple[bool, int, str]:
    """Sort numbers as numbers, and behind them what is none."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def note_sweep(folder: Path, command: Sequence[str], jobs: dict[str, list[str]], num_jobs: int) -> None:
    """Note what a sweep is to run.

    Args:
        folder: of the sweep.
        command: that started it.
        jobs: folder of a job -> its overrides, as far as they are known.
        num_jobs: how many there will be.
    """
    note = {"command": list(command), "cwd": str(Path.cwd()), "jobs": jobs, "num_jobs": num_jobs}
    write_text(folder / SWEEP_FILE, json.dumps(note, indent=1) + "\n")


def resume_command(folder: Path) -> str | None:
    """Return the command that runs what a sweep lacks, secrets hidden, if it is known what started it.

    Example:
        >>> resume_command(Path("nowhere")) is None
        True
    """
    command = read_note(folder / SWEEP_FILE).get("command")
    if not command:
        return None
    kept = [word for word in command if not word.startswith(("hydra.sweep.dir=", "resume="))]
    return shlex.join([*map(redacted_setting, kept), f"hydra.sweep.dir={folder}", "resume=true"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
