"""Models that become smaller in a run: their record in checkpoints, and how a smaller one is loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from lightning_prune.callbacks.evaluation import silenced, step_of
from lightning_prune.graph import Plan
from lightning_prune.graph.plan_data import to_data
from lightning_prune.model.calibration import evaluating
from lightning_prune.model.calls import Call, capture_call
from lightning_prune.model.record import KEY, shrink_to_

PLANS = "_pruning_plans"
"""Where a module remembers what has been taken out of it."""


def plans_of(module: L.LightningModule) -> list[Plan]:
    """Return the plans that were carried out on a module, in their order."""
    found: list[Plan] = vars(module).setdefault(PLANS, [])
    return found


def keep_record(module: L.LightningModule) -> None:
    """Let all checkpoints of a module keep the record, and let it shrink before it loads a smaller one's weights.

    Lightning gives callbacks a checkpoint only after the weights are loaded, and saves nothing of theirs where only
    weights are saved; the module's own two hooks come at the right time, and always.
    """
    for name, hook in (("on_save_checkpoint", _Saving), ("on_load_checkpoint", _Loading)):
        if not isinstance(vars(module).get(name), hook):
            vars(module)[name] = hook(module, vars(module).get(name))


class _Hook:
    """Stands before a hook of the module."""

    name: str

    def __init__(self, module: L.LightningModule, own: Any) -> None:
        self.module, self.own = module, own

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Do what is to be done for the record, then what the module does."""
        self.act(checkpoint)
        if self.own is not None:
            self.own(checkpoint)
        else:
            getattr(type(self.module), self.name)(self.module, checkpoint)

    def act(self, checkpoint: dict[str, Any]) -> None:
        """Do what is to be done for the record."""
        raise NotImplementedError


class _Saving(_Hook):
    name = "on_save_checkpoint"

    def act(self, checkpoint: dict[str, Any]) -> None:
        """Write the record into the checkpoint, if the module has become smaller."""
        if plans := plans_of(self.module):
            checkpoint[KEY] = to_data(plans)


class _Loading(_Hook):
    name = "on_load_checkpoint"

    def act(self, checkpoint: Mapping[str, Any]) -> None:
        """Make the module as small as the checkpoint's."""
        vars(self.module)[PLANS] = shrink_to_(self.module, checkpoint)


def example_call(module: L.LightningModule, batch: Any) -> Call:
    """Return the call of the model that the module's own step makes for a batch.

    Raises:
        ValueError: the step calls no submodule with parameters.
    """
    with silenced(module), evaluating(module), capture_call(module) as caught:
        step_of(module)(module, batch)
    if caught.call is None:
        raise ValueError(
            f"`granularity` of coupled groups follows a call of the model, but a step of {type(module).__name__} "
            "called no module that has parameters."
        )
    return caught.call
