"""Launchers that give each job a process of its own: one that fails, or is killed, takes no other along.

They stand on Hydra's plugins for joblib and submitit, which are imported when a sweep starts:
`pip install "lightning-prune[sweeps]"`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

MISSING = 'this launcher needs {}, which is missing: pip install "lightning-prune[sweeps]".'
OUTPUT_FILE = "output.log"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class ProcessLauncher(Launcher):
    """What our launchers share: jobs in processes, their output in their folders, a killed one noted there.

    Args:
        num_threads: of a job, for what computes on the CPU.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self.num_threads = num_threads
        self.config: DictConfig | None = None
        self.task_function: TaskFunction | None = None
        self.hydra_context: HydraContext | None = None
        self.arguments = list(sys.argv)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what is to be run."""
        self.config, self.task_function, self.hydra_context = config, task_function, hydra_context

    def folder_of(self, overrides: Sequence[str], number: int) -> Path:
        """Return the folder of a job."""
        assert self.config is not None
        name = next(
            (o.partition("=")[2] for o in overrides if o.startswith("hydra.sweep.subdir=")), str(number)
        )
        return Path(str(self.config.hydra.sweep.dir)) / name

    def announce(self, job_overrides: Sequence[Sequence[str]], first: int) -> None:
        """Say what is run, and where its output goes."""
        import logging

        assert self.config is not None
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        log = logging.getLogger(__name__)
        log.info(
            f"Launching {len(job_overrides)} jobs, output: {self.config.hydra.sweep.dir}/*/{OUTPUT_FILE}"
        )
        for i, overrides in enumerate(job_overrides):
            name = self.folder_of(overrides, first + i).name
            log.info(f"\t#{name} : {' '.join(filter_overrides(list(overrides)))}")

    def failed(self, overrides: Sequence[str], number: int, error: BaseException | str) -> JobReturn:
        """Return what a job has come to whose process is gone, and note it in its folder."""
        from lightning_prune.sweep.notes import note_error

        folder = self.folder_of(overrides, number)
        folder.mkdir(parents=True, exist_ok=True)
        note_error(folder, error)
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        failure = RuntimeError(f"job {folder.name}: {text}")
        return JobReturn(overrides=list(overrides), status=JobStatus.FAILED, _return_value=failure)


class JoblibLauncher(ProcessLauncher):
    """Run jobs in parallel on this machine.

    Args:
        n_jobs: how many at a time; -1 for one on each core, as joblib counts.
        num_threads: of each job.
    """

    def __init__(self, n_jobs: int = -1, num_threads: int = 1) -> None:
        super().__init__(num_threads)
        self.n_jobs = n_jobs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs, and return what they have come to, in their order."""
        try:
            import hydra_plugins.hydra_joblib_launcher._core  # noqa: F401
            from joblib import effective_n_jobs
        except ImportError as error:
            raise CompactHydraException(MISSING.format("hydra-joblib-launcher")) from error
        from lightning_prune.sweep.own_process import ProcessError, call_apart

        self.announce(job_overrides, initial_job_idx)
        calls = [self._call(initial_job_idx + i, list(job)) for i, job in enumerate(job_overrides)]
        environment = dict.fromkeys(THREADS, str(self.num_threads))
        results: dict[int, JobReturn] = {}
        with closing(call_apart(calls, effective_n_jobs(self.n_jobs), environment)) as answers:
            for i, answer in answers:
                if isinstance(answer, ProcessError):
                    answer = self.failed(job_overrides[i], initial_job_idx + i, str(answer))
                results[i] = answer
        return [results[i] for i in range(len(calls))]

    def _call(self, number: int, overrides: list[str]) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Return the call that runs a job, in a process of its own."""
        from hydra.core.singleton import Singleton

        output = self.folder_of(overrides, number) / OUTPUT_FILE
        parts = (self.hydra_context, self.config, self.task_function, Singleton.get_state())
        return run_job, (str(output), self.arguments, number, overrides, *parts)


def run_job(output: str, arguments: list[str], *job: Any) -> JobReturn:
    """Run a job in the process that was started for it."""
    begin(output, arguments)
    return execute(*job)


def begin(output: str, arguments: list[str]) -> None:
    """Make a process that of one job: its output goes to a file, and it looks as if the script had been started."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(file, number)
    os.close(file)
    sys.argv = list(arguments)
    sys.modules["__main__"].__spec__ = None  # DDP starts the script, not the launcher


def execute(
    number: int,
    overrides: list[str],
    hydra_context: HydraContext | None,
    config: DictConfig | None,
    task_function: TaskFunction | None,
    state: Any,
) -> JobReturn:
    """Run a job in this process."""
    from hydra_plugins.hydra_joblib_launcher._core import execute_job

    assert hydra_context is not None and config is not None and task_function is not None
    result: JobReturn = execute_job(number, overrides, hydra_context, config, task_function, state)
    return result
