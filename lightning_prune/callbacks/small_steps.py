"""Steps of a module that read more than its calls show: tried with a smaller model before there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_prune.callbacks.own_steps import silenced, step_of
from lightning_prune.model.averages import Verdict
from lightning_prune.model.calls import undisturbed
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.tried import first_unfit


def keep_what_steps_need(
    module: L.LightningModule, pruner: GroupPruner, batches: Sequence[Any]
) -> Iterator[str]:
    """Leave groups whole with which a step fails once they are smaller, and yield what is to be said of each.

    A step may use a weight outside of any call (`F.linear(h, self.encoder.weight.t())`), or a table that is as wide as
    what becomes smaller; validation may read other features than training does. A step that fails on the batch as the
    model is, as where validation has batches of another form, tells nothing.

    Args:
        module: the whole model.
        pruner: of it.
        batches: the last is what the steps are tried on.

    Raises:
        ValueError: nothing is left to prune, or a budget is out of reach of what is.
    """
    names = ("training_step", "validation_step") if module.automatic_optimization else ("validation_step",)
    for name in (name for name in names if is_overridden(name, module)):
        is_told = pruner.call.is_training and name == "training_step"
        run = partial(_run, module, step_of(module, batches, is_told=is_told, name=name), batches[-1])
        is_known = name == names[0]  # that step has shown the calls
        kinds = set[tuple[Any, str]]()
        while True:
            choice = pruner.contest.halve(pruner.contest.any_scores())
            found = first_unfit(pruner.couplings, choice, run, pruner.agree, is_known=is_known)
            if found is None:
                break
            group, error = found
            kind = _kind(pruner, group)
            alike = [other for other in pruner.contest.groups if _kind(pruner, other) == kind]
            found_names = alike if kind in kinds else [group]  # the second of a kind: so are the others
            kinds.add(kind)
            pruner.leave_whole_(found_names, f"`{name}` fails once it is smaller: {error}")
            for group in found_names:
                yield f"`{group}` stays whole, since {pruner.frozen[group]}"
    pruner.check_reach(Verdict.OPEN, Verdict.STAYS)


def _kind(pruner: GroupPruner, name: str) -> tuple[Any, str]:
    group = pruner.couplings.groups[name]
    return group.kind, group.role


def _run(module: L.LightningModule, step: Any, batch: Any) -> None:
    with undisturbed(module), silenced(module):
        step(module, batch)
