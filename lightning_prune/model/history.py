"""What was cut out of a model so far: its plans stay with it, and go into each checkpoint of a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_prune.graph import Plan
from lightning_prune.graph.plan_data import from_data, to_data

KEY = "lightning_prune_record"
"""Where a checkpoint keeps the plans, beside its `state_dict`."""
ATTRIBUTE = "_lightning_prune_plans"
HOOK = "on_save_checkpoint"


class SavesRecord:
    """Stands in for a module's `on_save_checkpoint`, which Lightning calls for each kind of checkpoint.

    Args:
        module: whose plans are saved.
        inner: what stood in for the hook before, or None.
    """

    def __init__(self, module: nn.Module, inner: Any) -> None:
        self.module, self.inner = module, inner

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Do what the module does, and put the record into the checkpoint."""
        if self.inner is not None:
            self.inner(checkpoint)
        else:
            getattr(type(self.module), HOOK)(self.module, checkpoint)
        write_record(self.module, checkpoint)


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """Return the plans that were carried out on a model, in this order."""
    plans: tuple[Plan, ...] = vars(model).get(ATTRIBUTE, ())
    return plans


def note_(model: nn.Module, plan: Plan, undo: ExitStack) -> None:
    """Note that a plan was carried out; a LightningModule puts it into all its checkpoints from now on."""
    own = vars(model)
    for name in (ATTRIBUTE, HOOK):
        undo.callback(own.__setitem__, name, own[name]) if name in own else undo.callback(own.pop, name, None)
    own[ATTRIBUTE] = (*plans_of(model), plan)
    if hasattr(type(model), HOOK) and not isinstance(own.get(HOOK), SavesRecord):
        own[HOOK] = SavesRecord(model, own.get(HOOK))


def write_record(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put the plans of a model into a checkpoint, if there are any."""
    if plans := plans_of(model):
        checkpoint[KEY] = to_data(plans)


def read_record(checkpoint: Mapping[str, Any]) -> tuple[Plan, ...]:
    """Return the plans of a checkpoint, none where it holds a dense model.

    Raises:
        ValueError: they are damaged, or newer than this version.
    """
    return from_data(checkpoint[KEY]) if KEY in checkpoint else ()
