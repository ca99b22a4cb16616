"""Whose weights are whose: callbacks prune weights of their own, and those stay in the module."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from torch import nn

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.core.patterns import listed
from lightning_prune.core.types import Name


def check_alone(callback: PruningCallback, trainer: L.Trainer) -> None:
    """Refuse weights that another callback of the kind holds masks of, too: each would undo what the other does.

    Raises:
        ValueError: there are such weights.
    """
    assert callback.pruner is not None
    ours = {id(parameter): name for name, parameter in callback.pruner.targets.items()}
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is callback or not isinstance(other, PruningCallback) or not other.holds_masks:
            continue
        shared = [ours[id(p)] for p in other.pruner.targets.values() if id(p) in ours] if other.pruner else []
        if shared:
            raise ValueError(
                f"`callbacks` prune weights of their own each, but got {type(other).__name__} and "
                f"{type(callback).__name__} for {listed(shared)}: tell them apart by `include` and `exclude`."
            )


def check_there(module: nn.Module, targets: Mapping[Name, nn.Parameter]) -> None:
    """See that a module still has what is pruned.

    Raises:
        ValueError: a module was replaced or removed, whose masks would be lost without a word.
    """
    here = {id(parameter) for parameter in module.parameters()}
    if gone := [name for name, parameter in targets.items() if id(parameter) not in here]:
        raise ValueError(
            f"`{gone[0]}` is pruned, but was taken out of the module or replaced in it since: change modules before "
            "fitting starts, or exclude them."
        )
