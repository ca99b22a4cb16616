"""Search in place of a grid, by Optuna: one goal or several, and what was interrupted goes on.

The sweep's folder is the memory: a search that goes on learns from the jobs that lie there. (Hydra's own plugin for
Optuna asks for Optuna 2, and ends with the first job that fails.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.lightning_prune.search_space import contains, distribution, read
from hydra_plugins.lightning_prune.sweepers import Jobs, check_all_done, note, prepared, with_folder

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)
DIRECTIONS = ("maximize", "minimize")
RESULT = "result"  # what a job returns where no metric is named


class OptunaSweeper(BasicSweeper):
    """Searches for the best settings, or for the front of those that no other beats.

    Args:
        metrics: what to search for, one column of the jobs' `metrics.json` or several; the application's own
            `optimized_metric` comes first where it is set.
        n_trials: how many jobs in all, those that lie in the folder already among them.
        n_jobs: how many at a time; a launcher that runs jobs in parallel makes use of it.
        direction: "maximize" or "minimize", for several goals a list; by default by the names of the metrics.
        sampler: of Optuna, as Hydra builds it.
        params: what to search in, name -> `interval(0.5, 0.98)`, `int(interval(1, 8))`,
            `tag(log, interval(1e-4, 0.1))`, `range(1, 9, 2)` or `choice(a, b)`; the command line takes the same.
    """

    def __init__(
        self,
        metrics: str | Sequence[str] | None = None,
        n_trials: int = 20,
        n_jobs: int = 1,
        direction: str | Sequence[str] | None = None,
        sampler: Any = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(max_batch_size=n_jobs, params=dict(params or {}))
        self.metrics, self.direction, self.sampler = metrics, direction, sampler
        self.n_trials, self.n_jobs = n_trials, n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what is to be run, and refuse a search without a goal."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.goals = goals_of(config.get("optimized_metric") or self.metrics, self.direction)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run trials until there are `n_trials`; the front of the best is in the report.

        Raises:
            CompactHydraException: the folder is taken, there is nothing to search in, or all jobs failed.
        """
        try:
            import optuna
        except ImportError as error:
            raise CompactHydraException(
                'the search needs optuna, which is missing: pip install "lightning-prune[sweeps]".'
            ) from error
        folder = prepared(self)
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = {o.get_key_element(): o for o in parser.parse_overrides([*self._parse_config(), *arguments])}
        fixed = [
            f"{name}={o.get_value_element_as_str()}"
            for name, o in parsed.items()
            if not o.is_sweep_override()
        ]
        space = {name: distribution(o) for name, o in parsed.items() if o.is_sweep_override()}
        if not space:
            raise CompactHydraException("`params` are settings to search in, but got only settled ones.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = [optuna.study.StudyDirection[d.upper()] for d in self.goals.values()]
        study = optuna.create_study(directions=directions, sampler=self.sampler)
        return self._search(study, folder, fixed, space)

    def _search(
        self, study: Study, folder: Path, fixed: list[str], space: dict[str, BaseDistribution]
    ) -> list[JobReturn]:
        jobs, unfinished = remember(study, folder, space, self.goals)
        numbers = (str(n) for n in range(len(jobs) + self.n_trials) if str(n) not in jobs)
        results: list[JobReturn] = []
        num_ended = len(jobs) - len(unfinished)
        while num_ended < self.n_trials:
            batch: Jobs = {}
            trials: list[Trial] = []
            for _ in range(min(self.n_jobs, self.n_trials - num_ended)):
                trials.append(study.ask(space))  # first those that were interrupted
                name = unfinished.pop(0) if unfinished else next(numbers)
                batch[name] = [*fixed, *(f"{key}={value}" for key, value in trials[-1].params.items())]
            jobs |= batch
            note(folder, jobs, max(self.n_trials, len(jobs)))
            results += self._run(study, folder, batch, trials, num_ended)
            num_ended += len(batch)
        if results and all(result.status == JobStatus.FAILED for result in results):
            check_all_done(folder, results)
        return results

    def _run(
        self, study: Study, folder: Path, batch: Jobs, trials: Sequence[Trial], first: int
    ) -> Sequence[JobReturn]:
        """Launch a batch, and let the study know."""
        from optuna.trial import TrialState

        assert self.launcher is not None
        self.validate_batch_is_legal(list(batch.values()))
        results = self.launcher.launch([with_folder(job, name) for name, job in batch.items()], first)
        for trial, name, result in zip(trials, batch, results, strict=True):
            values = values_of(folder / name, self.goals) if result.status == JobStatus.COMPLETED else None
            study.tell(trial, values, state=None if values else TrialState.FAIL)
            if values is None:
                log.warning(f"job {name} came to nothing, the search goes on without it")
        return results


def goals_of(names: Any, direction: str | Sequence[str] | None) -> dict[str, str]:
    """Return name of a metric -> direction.

    Example:
        >>> goals_of(["val/acc", "nonzeros"], None)
        {'val/acc': 'maximize', 'nonzeros': 'minimize'}
    """
    from lightning_prune.sweep.rows import is_lower_better

    names = OmegaConf.to_container(names) if OmegaConf.is_config(names) else names
    metrics = [names or RESULT] if isinstance(names, str) or not names else list(names)
    if direction is None:
        if metrics == [RESULT]:
            raise CompactHydraException(
                "`hydra.sweeper.metrics` is what to search for, as val/acc, but got None."
            )
        return {name: DIRECTIONS[is_lower_better(name)] for name in metrics}
    directions = [direction] if isinstance(direction, str) else list(direction)
    if len(directions) != len(metrics) or not set(directions) <= set(DIRECTIONS):
        raise CompactHydraException(
            f"`direction` is one of {list(DIRECTIONS)} for each of {metrics}, but got {directions}."
        )
    return dict(zip(metrics, directions, strict=True))


def remember(
    study: Study, folder: Path, space: Mapping[str, BaseDistribution], goals: Mapping[str, str]
) -> tuple[Jobs, list[str]]:
    """Tell a study of the jobs that lie in a sweep's folder, and what of them is to be tried again.

    Returns:
        Name of the folder -> overrides, for all jobs, and the names of those that have come to nothing yet, in the
        order in which the study asks for them.
    """
    from optuna.trial import create_trial

    from lightning_prune.sweep.notes import held_jobs

    jobs: Jobs = {}
    unfinished: list[str] = []
    for name, settings in held_jobs(folder).items():
        given = dict(setting.split("=", 1) for setting in settings)
        params = {key: read(given[key], kind) for key, kind in space.items() if key in given}
        if set(params) != set(space) or not all(contains(space[key], params[key]) for key in space):
            raise CompactHydraException(
                f"`hydra.sweep.dir` holds a search in the same settings, {list(space)}, but job {name} there has "
                f"{list(settings)}."
            )
        jobs[name] = list(settings)
        if values := values_of(folder / name, goals):
            study.add_trial(create_trial(params=params, distributions=dict(space), values=values))
        else:
            study.enqueue_trial(params)
            unfinished.append(name)
    return jobs, unfinished


def values_of(folder: Path, goals: Mapping[str, str]) -> list[float] | None:
    """Return what a job has reached, or None where it has not ended, or not in numbers."""
    from lightning_prune.sweep.notes import METRICS_FILE, read_note

    metrics = read_note(folder / METRICS_FILE)
    values = [float(metrics.get(name, math.nan)) for name in goals]
    return values if all(math.isfinite(value) for value in values) else None
