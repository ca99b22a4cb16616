"""Snapshots of a run: weights, optimizers and learning-rate schedules as they were, to go back to."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only


class Snapshot(TypedDict):
    """A moment of a run, safe under `torch.load(weights_only=True)`; no tensor of it is one of the run's."""

    module: dict[str, Any]
    optimizers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]


def take(module: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> Snapshot:
    """Return copies of what a run is made of.

    Args:
        module: its parameters and buffers.
        optimizers: their state.
        schedulers: of learning rates, their state.
    """
    states = {
        "module": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedulers": [_plain(scheduler.state_dict()) for scheduler in schedulers],
    }
    copied: Snapshot = tree_map_only(Tensor, lambda t: t.detach().clone(), copy.copy(states))
    return copied


def rewind_(
    snapshot: Snapshot,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    *,
    weights: bool = True,
) -> None:
    """Go back to a snapshot, in place; the snapshot can be used again.

    Args:
        snapshot: as `take` returned it, or as it came back from a checkpoint.
        module: gets its parameters and buffers, unless `weights` is False.
        optimizers: get their state; without `weights` the settings of their groups (learning rates) only.
        schedulers: get theirs.
        weights: False is learning-rate rewinding: what was learned stays, the schedule starts again.

    Raises:
        ValueError: the module has other tensors by now.
    """
    own: Snapshot = tree_map_only(Tensor, torch.clone, snapshot)
    if weights:
        try:
            module.load_state_dict(own["module"], strict=getattr(module, "strict_loading", True))
        except RuntimeError as error:
            raise ValueError(
                "`module` has the tensors that it had when the snapshot was taken, but got a module that has changed "
                f"since: {error}"
            ) from error
        for optimizer, state in zip(optimizers, own["optimizers"], strict=True):
            if (before := len(state["param_groups"])) != (now := len(optimizer.param_groups)):
                raise ValueError(
                    f"`optimizers` have the {before} groups of parameters that they had when the snapshot was taken, "
                    f"but got {type(optimizer).__name__} with {now}: a callback such as BackboneFinetuning has added "
                    "some."
                )
            optimizer.load_state_dict(state)
    else:
        for optimizer, state in zip(optimizers, own["optimizers"], strict=True):
            for group, before in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group |= {key: value for key, value in before.items() if key != "params"}
    for scheduler, state in zip(schedulers, own["schedulers"], strict=True):
        scheduler.load_state_dict(copy.deepcopy(state))


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a scheduler without the functions that some keep in it."""
    return {key: copy.deepcopy(value) for key, value in state.items() if not _is_code(value)}


def _is_code(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor)
