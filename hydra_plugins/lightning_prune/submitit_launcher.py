"""Jobs on a SLURM cluster, or, to try the same, in processes of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from hydra_plugins.lightning_prune.launchers import (
    MISSING,
    OUTPUT_FILE,
    THREADS,
    ProcessLauncher,
    begin,
    execute,
)


class SubmititLauncher(ProcessLauncher):
    """Run jobs through submitit: on a SLURM cluster, or in processes of this machine.

    Args:
        cluster: "slurm" or "local".
        num_threads: of each job.
        max_parallel: how many at a time on this machine; None for one on each core. A cluster has `array_parallelism`.
        submitit_folder: where submitit keeps its files and the output of jobs.
        max_num_timeout: how often a job that ran out of time is queued again; it goes on from its last checkpoint
            with `resume=true`.
        parameters: of submitit, e.g. `timeout_min`, `cpus_per_task`, `slurm_partition`.
    """

    def __init__(
        self,
        cluster: str,
        submitit_folder: str,
        num_threads: int = 1,
        max_parallel: int | None = None,
        max_num_timeout: int = 0,
        **parameters: Any,
    ) -> None:
        super().__init__(num_threads)
        self.cluster, self.submitit_folder, self.max_num_timeout = cluster, submitit_folder, max_num_timeout
        self.max_parallel = max_parallel or os.cpu_count() or 1
        self.parameters = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in parameters.items()
            if value is not None
        }

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit jobs, wait for all, and return what they have come to, in their order."""
        try:
            import submitit
        except ImportError as error:
            raise CompactHydraException(MISSING.format("submitit")) from error
        self.announce(job_overrides, initial_job_idx)
        limits = {"slurm_max_num_timeout": self.max_num_timeout} if self.cluster == "slurm" else {}
        try:
            executor = submitit.AutoExecutor(folder=self.submitit_folder, cluster=self.cluster, **limits)
        except RuntimeError as error:  # no SLURM here
            raise CompactHydraException(str(error)) from error
        executor.update_parameters(**self.parameters)
        jobs = self._submit(executor, [list(overrides) for overrides in job_overrides], initial_job_idx)
        try:
            return [
                self._result(job, list(overrides), initial_job_idx + i)
                for i, (job, overrides) in enumerate(zip(jobs, job_overrides, strict=True))
            ]
        except KeyboardInterrupt:
            if self.cluster == "local":  # those on a cluster go on
                for job in jobs:
                    job.cancel(check=False)
            raise

    def _submit(self, executor: Any, jobs: list[list[str]], first: int) -> list[Any]:
        """Submit jobs: to a cluster as one array, on this machine not more at a time than it bears."""
        from hydra.core.singleton import Singleton

        state = Singleton.get_state()
        numbers = range(first, first + len(jobs))
        if self.cluster != "local":
            return list(executor.map_array(self, jobs, numbers, [state] * len(jobs)))
        submitted: list[Any] = []
        try:
            for number, overrides in zip(numbers, jobs, strict=True):
                while sum(not job.done() for job in submitted) >= self.max_parallel:
                    time.sleep(0.2)
                submitted.append(executor.submit(self, overrides, number, state))
        except KeyboardInterrupt:
            for job in submitted:
                job.cancel(check=False)
            raise
        return submitted

    def __call__(self, overrides: list[str], number: int, state: Any) -> JobReturn:
        """Run a job, in the process that submitit has started for it."""
        output = self.folder_of(overrides, number) / OUTPUT_FILE
        os.environ.update(dict.fromkeys(THREADS, str(self.num_threads)))
        begin(str(output), self.arguments)
        return execute(number, overrides, self.hydra_context, self.config, self.task_function, state)

    def checkpoint(self, *arguments: Any) -> Any:
        """Queue a job again that ran out of time: it goes on from its last checkpoint."""
        import submitit

        overrides, *others = arguments
        return submitit.helpers.DelayedSubmission(self, [*overrides, "++resume=true"], *others)

    def _result(self, job: Any, overrides: list[str], number: int) -> JobReturn:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            result: JobReturn = job.results()[0]
            return result
        except (FailedJobError, UncompletedJobError) as error:
            reason = str(error).strip().splitlines()[0]
            return self.failed(overrides, number, f"its process ended before it did: {reason}")
