"""From what callbacks have seen to the report's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import lightning as L
from torch import nn

from lightning_prune.model.calls import Call
from lightning_prune.model.history import plans_of
from lightning_prune.model.kernels import measure_kernels
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shards import num_nonzeros
from lightning_prune.model.shrinking import AnyPruner, groups_of
from lightning_prune.report.costs import Cost
from lightning_prune.report.data import Evaluation, Layer, Report, Update
from lightning_prune.report.environment import environment
from lightning_prune.report.invocation import current

MAX_MEASURED = 8  # layers with sparse kernels, the largest ones
SECONDS = 0.1  # of measuring each


@runtime_checkable
class Prunes(Protocol):
    """What a report tells of a pruning callback."""

    kind: ClassVar[str]
    pruner: AnyPruner | None
    dense: nn.Module | None
    updates: list[dict[str, Any]]
    warnings: list[str]
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]
    path: str | None

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        ...


def build_report(
    callbacks: Sequence[Prunes],
    before: Cost | None,
    after: Cost,
    evaluations: Sequence[Evaluation],
    trainer: L.Trainer,
    module: L.LightningModule,
) -> Report:
    """Put together what is known at the end of a run."""
    pruners = [callback.pruner for callback in callbacks if callback.pruner is not None]
    updates = sorted((u for callback in callbacks for u in _updates(callback)), key=lambda u: u.step)
    path, invocation = _checkpoint(callbacks, trainer), current()
    metrics_before, metrics_after = _metrics(callbacks, evaluations, _target(pruners))
    return Report(
        kind=callbacks[0].kind if callbacks else "none",
        recipe=_recipe(callbacks),
        target_sparsity=_target(pruners),
        achieved_sparsity=_achieved(pruners),
        layers=tuple(layer for pruner in pruners for layer in _layers(pruner, before, after)),
        updates=tuple(updates),
        evaluations=tuple(evaluations),
        cost_before=before,
        cost_after=after,
        metrics_before=metrics_before,
        metrics_after=metrics_after,
        warnings=tuple(warning for callback in callbacks for warning in callback.warnings),
        environment=environment(),
        checkpoint=path,
        resume_command=None if _is_pruned_once(callbacks) else _resume_command(path),
        load_command=_load_command(module, path),
        equivalence_error=max((e for p in pruners for e in _errors(p)), default=None),
        frozen={name: why for pruner in pruners for name, why in _frozen(pruner).items()},
        groups=tuple(group for pruner in pruners for group in groups_of(pruner)),
        model=type(module).__name__,
        command=invocation.command if invocation else None,
        config=invocation.config if invocation else None,
    )


def with_kernels(report: Report, module: nn.Module, call: Call) -> Report:
    """Return a report that tells what kernels made for zeros would bring, where a layer is sparse enough to try."""
    try:
        found = measure_kernels(module, call, max_layers=MAX_MEASURED, seconds=SECONDS)
    except Exception as error:  # a run is never stopped by its report
        return replace(report, warnings=(*report.warnings, f"Sparse kernels could not be measured: {error}"))
    return replace(report, acceleration=found) if any(layer.sparse for layer in found.layers) else report


def with_macs_of(before: Cost, seen: Cost) -> Cost:
    """Return the cost of the dense model with the multiply-accumulates of a call that was seen when it was pruned.

    Those are the same for both, zeros included; what is effective follows from the densities of the dense weights.
    """
    if before.macs is not None:
        return before
    if seen.macs is None:
        told = {name: why for name, why in seen.unmeasured.items() if name in ("macs", "effective_macs")}
        return replace(before, unmeasured={**before.unmeasured, **told})
    macs = {layer.name: layer.macs for layer in seen.layers}
    layers = tuple(replace(layer, macs=macs.get(layer.name)) for layer in before.layers)
    idle = sum((w.macs or 0) * (1 - (w.nonzeros or 0) / w.params) for w in layers if w.params)
    unmeasured = {
        name: why for name, why in before.unmeasured.items() if name not in ("macs", "effective_macs")
    }
    return replace(
        before,
        macs=seen.macs,
        effective_macs=round(seen.macs - idle),
        batch_size=seen.batch_size,
        layers=layers,
        unmeasured=unmeasured,
    )


def _resume_command(path: str | None) -> str | None:
    """How to go on with the run: by its command line, where it had one."""
    if path is None:
        return None
    invocation = current()
    own = invocation.resumed(path) if invocation else None
    return own or f"trainer.fit(model, ckpt_path={path!r})"


def _load_command(module: L.LightningModule, path: str | None) -> str | None:
    """How to load the checkpoint, as a line of Python: a smaller model has to be made as small first."""
    if path is None:
        return None
    name, home = type(module).__qualname__, type(module).__module__
    is_importable = home != "__main__" and "<" not in name
    imports = [f"from {home} import {name.partition('.')[0]}"] if is_importable else []
    if not plans_of(module):
        return "; ".join([*imports, f"model = {name}.load_from_checkpoint({path!r})"])
    imports.insert(0, "from lightning_prune import load_pruned")
    return "; ".join([*imports, f"model = load_pruned({name}, {path!r})"])


def _errors(pruner: AnyPruner) -> list[float]:
    plans = [] if isinstance(pruner, Pruner) else pruner.plans
    return [plan.error for plan in plans if plan.error is not None]


def _frozen(pruner: AnyPruner) -> dict[str, str]:
    """What could not become smaller, but for what nobody expects to: kernels, inputs and outputs."""
    return {} if isinstance(pruner, Pruner) else {**pruner.couplings.frozen, **pruner.frozen}


def _is_pruned_once(callbacks: Sequence[Prunes]) -> bool:
    return any(callback.kind == "post_training" for callback in callbacks)


def _checkpoint(callbacks: Sequence[Prunes], trainer: L.Trainer) -> str | None:
    """The pruned model's file: written by the pruning itself, or the last one of the run."""
    own = [callback.path for callback in callbacks if callback.path]
    last = getattr(trainer.checkpoint_callback, "last_model_path", "") or getattr(
        trainer.checkpoint_callback, "best_model_path", ""
    )
    return own[0] if own else last or None


def _metrics(
    callbacks: Sequence[Prunes], evaluations: Sequence[Evaluation], target: float | None
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Metrics of the dense and of the pruned model: measured on purpose, or the last ones seen in each state.

    Where nothing is to be pruned, the dense model is what the run was for.
    """
    for callback in callbacks:
        if callback.metrics_after:
            return callback.metrics_before, callback.metrics_after
    if not evaluations:
        return {}, {}
    if not callbacks or target == 0.0:
        return {}, evaluations[-1].metrics
    dense = [evaluation.metrics for evaluation in evaluations if evaluation.sparsity == 0.0]
    return (dense[-1] if dense else {}), (evaluations[-1].metrics if evaluations[-1].sparsity else {})


def _recipe(callbacks: Sequence[Prunes]) -> dict[str, str]:
    """The nouns; with several callbacks, each noun with the number of its callback."""
    if len(callbacks) == 1:
        return callbacks[0].describe()
    return {
        f"{noun} ({i})": text
        for i, cb in enumerate(callbacks, start=1)
        for noun, text in cb.describe().items()
    }


def _achieved(pruners: Sequence[AnyPruner]) -> float | None:
    """The sparsity reached, over all that the pruners remove."""
    if not pruners:
        return None
    if len(pruners) == 1:
        return pruners[0].sparsity
    sizes = [sum(parameter.numel() for parameter in pruner.targets.values()) for pruner in pruners]
    return sum(n * pruner.sparsity for n, pruner in zip(sizes, pruners, strict=True)) / sum(sizes)


def _updates(callback: Prunes) -> list[Update]:
    """What the updates have come to; where a budget was asked for, no sparsity was."""
    found = [Update(**update) for update in callback.updates]
    is_budget = callback.pruner is not None and callback.pruner.recipe.budget is not None
    return [replace(update, requested=None) for update in found] if is_budget else found


def _target(pruners: Sequence[AnyPruner]) -> float | None:
    """The final sparsity, over the groups of all pruners; None where one of them goes by a budget."""
    if any(pruner.recipe.budget is not None for pruner in pruners):
        return None
    sizes = [pruner.num_groups for pruner in pruners]
    if not sum(sizes):
        return None
    return sum(size * pruner.final_sparsity for size, pruner in zip(sizes, pruners, strict=True)) / sum(sizes)


def _layers(pruner: AnyPruner, before: Cost | None, after: Cost) -> list[Layer]:
    macs = [{layer.name: layer.macs for layer in cost.layers} if cost else {} for cost in (before, after)]
    layers = []
    for name, parameter in pruner.targets.items():
        num_groups, num_kept = pruner.count_groups(name) or (None, None)
        layers.append(
            Layer(
                name=name,
                shape=tuple(parameter.shape),
                params=parameter.numel(),
                nonzeros=num_nonzeros(parameter),
                num_groups=num_groups,
                num_kept=num_kept,
                macs_before=macs[0].get(name),
                macs_after=macs[1].get(name),
            )
        )
    return layers
