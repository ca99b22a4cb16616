"""Sweepers that know what is there already: a sweep that was interrupted goes on, whatever launches its jobs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

Overrides = list[str]
Jobs = dict[str, Overrides]
NUMBERED = "${hydra.job.num}"


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, the product of all choices, but a failed job stops no other, and a sweep can be resumed.

    With `resume=true` in a folder that holds a part of the sweep, finished jobs are left alone, others go on from
    their last checkpoint, and what is new is added, whatever the order of the choices.

    Args:
        max_batch_size: how many jobs a launcher gets at once; None for all.
        params: further choices, name -> values.
    """

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run all jobs, or those that are missing.

        Raises:
            CompactHydraException: the folder is taken, or jobs failed; after all others have been run.
        """
        folder = prepared(self)
        assert self.hydra_context is not None and self.launcher is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*self._parse_config(), *arguments])
        (jobs,) = self.split_arguments(parsed, None)
        placed, waiting = placed_jobs(folder, [list(job) for job in jobs])
        self.validate_batch_is_legal([placed[name] for name in waiting])
        note(folder, placed, len(jobs))
        results = []
        size = self.max_batch_size or max(1, len(waiting))
        for at in range(0, len(waiting), size):
            batch = waiting[at : at + size]
            results.append(self.launcher.launch([with_folder(placed[n], n) for n in batch], at))
        check_all_done(folder, [result for batch in results for result in batch])
        return results


def prepared(sweeper: BasicSweeper) -> Path:
    """Return the folder of a sweep that is about to begin, with Hydra's own note in it.

    Raises:
        CompactHydraException: in a process that only helps to train, where another sweep lies there, for folders of
            other names, or where one of its jobs lies outside.
    """
    from lightning_prune.sweep.notes import held_jobs, is_first_process

    assert sweeper.config is not None
    if not is_first_process():
        raise CompactHydraException(
            "a sweep is started by the first process alone: this one only helps to train."
        )
    folder, subdir = Path(sweeper.config.hydra.sweep.dir), sweeper.config.hydra.sweep._get_node("subdir")
    if subdir is not None and str(subdir._value()) != NUMBERED:
        raise CompactHydraException(
            f"`hydra.sweep.subdir` is {NUMBERED}, by which a sweep finds its jobs again, but got "
            f"{str(subdir._value())!r}."
        )
    if not sweeper.config.get("resume") and next(folder.glob("*/.hydra"), None):
        raise CompactHydraException(
            f"`hydra.sweep.dir` is a new folder, but got {str(folder)!r}, which holds jobs: resume=true goes on "
            "with them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held_jobs(folder)
    except ValueError as error:
        raise CompactHydraException(str(error)) from error
    OmegaConf.save(sweeper.config, folder / "multirun.yaml")
    return folder


def placed_jobs(folder: Path, jobs: Sequence[Overrides]) -> tuple[Jobs, list[str]]:
    """Give each job its folder, the one where it lies already, or the next free number.

    Returns:
        Name of the folder -> overrides, for all jobs, and the names of those that are not done.
    """
    from lightning_prune.sweep.notes import held_jobs, settings_of, status_of

    held = held_jobs(folder)
    numbers = (str(n) for n in range(len(held) + len(jobs)) if str(n) not in held)
    homes: dict[tuple[str, ...], list[str]] = {}
    for name, settings in held.items():
        homes.setdefault(settings, []).append(name)
    placed: Jobs = {}
    for job in jobs:
        known = homes.get(settings_of(job))
        placed[known.pop(0) if known else next(numbers)] = job
    return placed, [name for name in placed if status_of(folder / name) != "done"]


def with_folder(overrides: Sequence[str], name: str) -> Overrides:
    """Send a job to its folder."""
    return [*overrides, f"hydra.sweep.subdir={name}"]


def note(folder: Path, jobs: Jobs, num_jobs: int) -> None:
    """Note what is to be run, for those who read the folder later."""
    from lightning_prune.sweep.notes import note_sweep

    script = sys.argv[0]
    words = ["python", "-m", spec.name] if (spec := sys.modules["__main__"].__spec__) else ["python", script]
    note_sweep(folder, [*words, *sys.argv[1:]], jobs, num_jobs)


def check_all_done(folder: Path, results: Sequence[JobReturn]) -> None:
    """Answer failed jobs in one line: the report and their folders tell more.

    Raises:
        CompactHydraException: a job failed.
    """
    if failed := [result for result in results if result.status != JobStatus.COMPLETED]:
        raise CompactHydraException(
            f"{len(failed)} of {len(results)} jobs failed, see the table: python -m lightning_prune.sweep {folder}"
        )
