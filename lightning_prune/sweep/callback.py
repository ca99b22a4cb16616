"""Hydra's callback: a sweep that shows how far it is, and ends in a table, a picture and a page."""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_prune.core.checks import check_range
from lightning_prune.core.directions import checked_mode
from lightning_prune.report.numbers import numbers_of
from lightning_prune.report.storage import load, write_text
from lightning_prune.sweep.choice import TOLERANCE
from lightning_prune.sweep.notes import METRICS_FILE, SWEEP_FILE, is_first_process, note_error, start_job
from lightning_prune.sweep.progress import Progress
from lightning_prune.sweep.rows import SEEDS
from lightning_prune.sweep.summary import report


class SweepReport(Callback):
    """Shows how far a multirun is, and reports when it ends, also when jobs failed or it was interrupted.

    Args:
        sort_by: the column to sort the table by, best first; by default the metric.
        metric: the column of quality to choose by; by default of validation, accuracy before perplexity before loss.
        mode: "min" or "max", what is better of the metric; by default as its name says.
        size: the column of size to choose by; by default the first of nonzeros, params, num_bytes, ... that differs.
        tolerance: what the recommended model may lose, as `recommend` says; 0 or more.
        seeds: names of the overrides that are repetitions.
        progress: whether to show how far it is.

    Raises:
        ValueError: a tolerance below 0, or a metric whose name does not tell what is better, and no mode.

    In an application of your own, the row of a job is what its report in its folder says, and what the job returns: a
    mapping of numbers by name, or one number, which goes by the `optimized_metric` of the configuration if it has one.
    """

    def __init__(
        self,
        sort_by: str | None = None,
        metric: str | None = None,
        mode: str | None = None,
        size: str | None = None,
        tolerance: float = TOLERANCE,
        seeds: Sequence[str] = SEEDS,
        progress: bool = True,
    ) -> None:
        check_range("tolerance", tolerance, 0.0, float("inf"), "what may be lost, 0 or more")
        if metric is not None or mode is not None:
            checked_mode(str(metric), mode)
        how = {"sort_by": sort_by, "metric": metric, "mode": mode, "size": size, "tolerance": tolerance}
        self.report: Callable[[Path], object] = partial(report, **how, seeds=tuple(seeds))  # type: ignore[arg-type]
        self.metric, self.mode, self.progress = metric, mode, progress
        self._waiting: Path | None = None
        self._shown: Progress | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make sure of a report: Hydra calls `on_multirun_end` only if no job fails."""
        if not is_first_process():
            return
        self._waiting = Path(config.hydra.sweep.dir)
        atexit.register(self._report)
        if self.progress:
            in_this_process = "BasicLauncher" in str(OmegaConf.select(config, "hydra.launcher._target_"))
            self._shown = Progress(self._waiting, self.metric, self.mode, is_shared=in_this_process)
            self._shown.start()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave a note of who runs the job."""
        if is_first_process():
            overrides = [str(override) for override in config.hydra.overrides.task]
            start_job(Path(config.hydra.runtime.output_dir), overrides, bool(config.get("resume")))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Leave a note of what came of it, or of what went wrong, in the job's folder."""
        if not is_first_process():
            return
        folder, result = Path(config.hydra.runtime.output_dir), job_return._return_value
        if job_return.status == JobStatus.FAILED:
            note_error(folder, result)
        elif not (folder / METRICS_FILE).is_file():
            name = config.get("optimized_metric")
            metrics = reported(folder) | _as_metrics(result, name if isinstance(name, str) else "result")
            if not metrics:
                return
            write_text(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and show the report."""
        self._report()

    def _report(self) -> None:
        folder, self._waiting = self._waiting, None
        if self._shown is not None:
            self._shown.stop()
        if folder is None or not ((folder / SWEEP_FILE).is_file() or next(folder.glob("**/.hydra"), None)):
            return  # no job has begun
        try:
            self.report(folder)
        except ValueError as error:  # no job has the column
            sys.stderr.write(f"no report on the sweep: {error}\n")

    def __getstate__(self) -> dict[str, Any]:
        """Go to other processes without what belongs to this one."""
        return {**self.__dict__, "_shown": None, "_waiting": None}


def reported(folder: Path) -> dict[str, float]:
    """Return the numbers of the report that a run has left in its folder, the last one if there are several."""
    found = sorted(folder.rglob("report.json"), key=lambda path: path.stat().st_mtime_ns)
    return numbers_of(load(found[-1])) if found else {}


def _as_metrics(result: object, name: str) -> dict[str, float]:
    """Return the numbers among what a job returned, a single one under a name."""
    named = result if isinstance(result, Mapping) else {name: result}
    return {str(name): float(value) for name, value in named.items() if isinstance(value, (int, float))}
