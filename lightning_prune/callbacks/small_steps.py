"""Steps of a module that read more than its calls show: tried with a smaller model before there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_prune.callbacks.own_steps import silenced, step_of
from lightning_prune.callbacks.structure import Shown
from lightning_prune.graph import Choice
from lightning_prune.model.averages import Verdict
from lightning_prune.model.calls import undisturbed
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.tried import first_unfit


def keep_what_steps_need(module: L.LightningModule, pruner: GroupPruner, shown: Shown) -> Iterator[str]:
    """Leave groups whole with which a step fails once they are smaller, and yield what is to be said of each.

    A step may use a weight outside of any call (`F.linear(h, self.encoder.weight.t())`), or a table that is as wide as
    what becomes smaller, perhaps in training mode alone; validation may read other features than training does. A step
    that fails on the batch as the model is, as where validation has batches of another form, tells nothing.

    Args:
        module: the whole model.
        pruner: of it.
        shown: has the batches that the steps are tried on, those that show what is called.

    Raises:
        ValueError: nothing is left to prune, or a budget is out of reach of what is.
    """
    ways = [("training_step", pruner.call.is_training), ("training_step", True), ("validation_step", False)]
    ways = list(dict.fromkeys(ways)) if module.automatic_optimization else ways[-1:]
    for place, (name, is_told) in enumerate(ways):
        if not is_overridden(name, module):
            continue
        step = step_of(module, shown.batches, is_told=is_told, name=name)
        run = partial(_run, module, step, shown.telling or shown.batches[-1:])
        is_known = not place  # that step has shown the calls
        seen = set[tuple[str, str]]()
        while found := first_unfit(pruner.couplings, _half(pruner), run, pruner.agree, is_known=is_known):
            group, error = found
            alike = pruner.couplings.unfit_with(group, seen)
            unfit = [name for name in alike if name in pruner.contest.groups]
            pruner.leave_whole_(unfit, f"`{name}` fails once it is smaller: {error}{_advice(pruner)}")
            pruner.check_reach(Verdict.OPEN, Verdict.STAYS)
            yield from (f"`{other}` stays whole, since {pruner.frozen[other]}" for other in unfit)


def _advice(pruner: GroupPruner) -> str:
    """Say what helps where a step may be averaging weights into a copy, which is not smaller yet when it is tried."""
    suspect = next(iter(pruner.copies.suspects), None)
    return f" (average weights into `{suspect}` in on_train_batch_end, not in the step)" if suspect else ""


def _half(pruner: GroupPruner) -> Choice:
    return pruner.contest.halve(pruner.contest.any_scores())


def _run(module: L.LightningModule, step: Any, batches: Sequence[Any]) -> None:
    with undisturbed(module), silenced(module):
        for batch in batches:
            step(module, batch)
