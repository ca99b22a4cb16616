"""Watches a run and reports on it: what was removed, what that gained, what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import nn

from lightning_prune.callbacks.reporting import Prunes, build_report, with_kernels, with_macs_of
from lightning_prune.callbacks.states import restoring
from lightning_prune.core.checks import check_path
from lightning_prune.model.calls import autocast_of
from lightning_prune.model.cost import Call, compare_with_dense, measure
from lightning_prune.model.joint_calls import StepCalls, capture_step, parts_of
from lightning_prune.model.shards import has_shards
from lightning_prune.report.costs import Cost
from lightning_prune.report.data import Evaluation, Report
from lightning_prune.report.progress import showing, working
from lightning_prune.report.render import to_rich, write
from lightning_prune.report.storage import from_json, to_json


class SparsityMonitor(L.Callback):
    """Write `report.json`, `report.md` and `report.html` beside the run, and show the report in the terminal.

    A pruning callback adds one by itself; add your own to choose the folder, or to report on a run that prunes
    nothing, as the dense baseline of a comparison. Costs are measured on the first batch of the run and at its end.

    Cost: the model is counted on the first batch and at the end; with `latency` some seconds of a large model's time.

    When: always: a pruning callback adds one by itself, and the dense baseline wants one to be compared with.

    Args:
        folder: where to write; by default the logger's folder, or the trainer's `default_root_dir`.
        latency: whether to measure latency, which takes some seconds of a large model's time.
        show: whether to print the report when the run ends.

    Example:
        >>> SparsityMonitor(latency=False).report is None
        True
    """

    def __init__(self, folder: str | Path | None = None, *, latency: bool = True, show: bool = True) -> None:
        self.folder = None if folder is None else check_path("folder", folder)
        self.latency, self.show = latency, show
        self.report: Report | None = None
        self._cost_before: Cost | None = None
        self._evaluations: list[Evaluation] = []
        self._call: Call | None = None
        self._catcher: StepCalls | None = None
        self._capturing = ExitStack()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the model before anything is pruned; what a call of it costs is added with the first batch."""
        if self._call is not None and parts_of(self._call.module)[0] not in set(pl_module.modules()):
            self._cost_before, self._call, self._catcher = (
                None,
                None,
                None,
            )  # of a module that was trained before
            self._evaluations = []
        self._cost_before = self._cost_before or measure(pl_module, latency=False)

    def _start_capture(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Watch the first batch, to have a call of the model that can be replayed; one of sharded weights cannot be."""
        if self._catcher is None and self._call is None and not has_shards(pl_module):
            self._catcher = self._capturing.enter_context(capture_step(pl_module))

    def _end_capture(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._call is None and self._catcher is not None:
            self._capturing.close()
            self._take(pl_module, self._catcher.call)

    on_train_batch_start = on_validation_batch_start = _start_capture  # type: ignore[assignment]
    on_train_batch_end = on_validation_batch_end = _end_capture  # type: ignore[assignment]

    @property
    def called(self) -> nn.Module | None:
        """What is called where costs are measured; None where no call was seen yet."""
        return None if self._call is None else self._call.module

    def note_call(self, trainer: L.Trainer, pl_module: L.LightningModule, call: Call) -> None:
        """Take the call that a pruner follows, where none was seen yet, before anything becomes smaller."""
        if self._catcher is None and self._call is None and not has_shards(pl_module):
            with trainer.precision_plugin.forward_context():
                autocast = call.autocast or autocast_of(pl_module)
            self._take(pl_module, replace(call, autocast=autocast))

    def _take(self, pl_module: L.LightningModule, call: Call | None) -> None:
        """Measure costs by a call from now on."""
        self._call, seen = call, measure(pl_module, call, latency=False)
        self._cost_before = with_macs_of(self._cost_before, seen) if self._cost_before else seen

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the metrics, and the sparsity that they were reached at."""
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("pruning/")}
        updates = [update for callback in self._pruning(trainer) for update in callback.updates]
        sparsity = updates[-1]["achieved"] if updates else 0.0
        found = Evaluation(trainer.global_step, sparsity, metrics, trainer.current_epoch)
        if (
            self._evaluations and (last := self._evaluations[-1]).step > found.step
        ):  # a checkpoint's, not trained
            found = replace(found, step=last.step, epoch=last.epoch)
        self._evaluations.append(found)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the report."""
        self.finish(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind; of a run that is ended by Ctrl-C, report on what is done."""
        self._capturing.close()
        is_fit = trainer.state.fn == "fit" and trainer.global_step > 0
        if is_fit and isinstance(exception, KeyboardInterrupt) and trainer.world_size == 1:
            self._report_interrupted(trainer, pl_module)

    def _report_interrupted(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the report as far as the run has come, without what takes long to measure."""
        after = measure(pl_module, self._call, latency=False, compress=False)
        callbacks, before = self._pruning(trainer), self._cost_before
        report = build_report(callbacks, before, after, self._evaluations, trainer, pl_module)
        kept = "its last checkpoint is kept" if report.checkpoint else "there is no checkpoint of it yet"
        told = f"The run was interrupted after {trainer.global_step:,} steps, in epoch {trainer.current_epoch}; {kept}."
        self.report = replace(report, warnings=(*report.warnings, told))
        paths = write(self.report, self._folder(trainer))
        if self.show:
            Console().print(f"{told} Report: {paths[-1]}", soft_wrap=True, highlight=False, markup=False)
            if report.resume_command:
                Console().print(
                    f"Go on: {report.resume_command}", soft_wrap=True, highlight=False, markup=False
                )

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or trainer.log_dir or trainer.default_root_dir)

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Report:
        """Measure the model as it is now, write the report and return it; on all processes it is the first one's."""
        folder = self._folder(trainer)
        callbacks, before = self._pruning(trainer), self._cost_before
        dense = next((cb.dense for cb in callbacks if cb.dense is not None), None)
        with ExitStack() as stack:
            for module in [pl_module] + ([] if dense is None else [dense]):
                if self._call is not None:  # of sharded weights there is none, and they stay where they are
                    stack.enter_context(_lying_on(trainer.strategy.root_device, module))
            after = measure(pl_module, self._call, latency=self.latency and not callbacks)
            if self.latency and callbacks and self._call and before:
                with showing(), working("measuring latency, before and after in turns"):
                    before, after = compare_with_dense(pl_module, self._call, before, after, dense)
            report = build_report(callbacks, before, after, self._evaluations, trainer, pl_module)
            if self.latency and callbacks and self._call:
                report = with_kernels(report, pl_module, self._call)
        self.report = trainer.strategy.broadcast(report)
        if trainer.is_global_zero:
            paths = write(self.report, folder)
            if self.show:
                console = Console()
                console.print(to_rich(self.report))
                console.print(f"Report: {paths[-1]}", soft_wrap=True, highlight=False)
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far, as the text of a report."""
        seen = Report("none", cost_before=self._cost_before, evaluations=tuple(self._evaluations))
        return {"seen": to_json(seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was seen before the run was interrupted."""
        with restoring(self):
            seen = from_json(state_dict["seen"])
        self._cost_before, self._evaluations = seen.cost_before, list(seen.evaluations)

    @staticmethod
    def _pruning(trainer: L.Trainer) -> list[Prunes]:
        return [cb for cb in trainer.callbacks if isinstance(cb, Prunes)]  # type: ignore[attr-defined]


@contextmanager
def _lying_on(device: torch.device, module: nn.Module) -> Iterator[None]:
    """Let a module lie where it was trained: when a run on a GPU is over, Lightning moves it to the CPU."""
    before = next((p.device for p in module.parameters()), device)
    if before != device:
        module.to(device)
    try:
        yield
    finally:
        if before != device:
            module.to(before)
