"""The record of a pruning: the plans that were carried out, kept in checkpoints and replayed on dense models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_prune.graph import Plan
from lightning_prune.graph.plan_data import from_data
from lightning_prune.model.skip import Skip
from lightning_prune.model.surgery import carry_out_

KEY = "lightning_prune_record"
"""Where a checkpoint keeps the plans, beside its `state_dict`."""
M = TypeVar("M", bound=nn.Module)


def replay_(model: nn.Module, plans: Iterable[Plan]) -> None:
    """Make a freshly built dense model as small as the plans say, before weights are loaded into it.

    Raises:
        ValueError: the plans belong to another model; this one is then as it was.
    """
    with ExitStack() as undo:
        for plan in plans:
            carry_out_(model, plan, undo)
        undo.pop_all()


def shrink_to_(model: nn.Module, checkpoint: Mapping[str, Any]) -> list[Plan]:
    """Make a model as small as the one of a checkpoint, if it is not yet, and return all plans of the checkpoint.

    Raises:
        ValueError: the record is damaged, of a newer version, or belongs to another model, which is then as it was.
    """
    plans = record_of(checkpoint)
    weights = checkpoint.get("state_dict", {})
    own = model.state_dict()
    cut = {name for plan in plans for name in plan.slices}
    if any(name in own and name in weights and own[name].shape != weights[name].shape for name in cut) or any(
        path and not isinstance(model.get_submodule(path), Skip)
        for plan in plans
        for path, how in plan.replaced.items()
        if how.startswith("skip")
    ):
        replay_(model, plans)
    return plans


def record_of(checkpoint: Mapping[str, Any]) -> list[Plan]:
    """Return the plans of a checkpoint, none where it holds a dense model.

    Raises:
        ValueError: they are damaged or newer than this version.
    """
    return list(from_data(checkpoint[KEY])) if KEY in checkpoint else []


def load_pruned(
    cls: type[M], path: str | Path, *, map_location: Any = "cpu", strict: bool = True, **kwargs: Any
) -> M:
    """Build a model and load the weights of a checkpoint in which it is smaller.

    It works as `Class.load_from_checkpoint` does, on dense checkpoints too. Nothing is unpickled but plain data.

    Args:
        cls: the LightningModule.
        path: of a checkpoint.
        map_location: where the weights go, as for `torch.load`.
        strict: whether the names must agree, as for `load_state_dict`.
        kwargs: arguments of `cls` that the checkpoint does not hold, or others than it holds.

    Raises:
        ValueError: the record is damaged, of a newer version, or belongs to another model.

    Example:
        >>> load_pruned(LitModel, "pruned.ckpt")  # doctest: +SKIP
    """
    checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"`path` is a checkpoint with a state_dict, but got {path}, which has none.")
    record_of(checkpoint)
    model = cls(**{**checkpoint.get("hyper_parameters", {}), **kwargs})
    shrink_to_(model, checkpoint)
    hook: Any = getattr(model, "on_load_checkpoint", None)
    if hook is not None:
        hook(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=strict)
    return model.to(map_location) if isinstance(map_location, (str, torch.device)) else model


class ReplaysRecord:
    """A mixin for LightningModules whose pruned checkpoints `Class.load_from_checkpoint` is to load by itself.

    Put it first: `class LitModel(ReplaysRecord, LightningModule)`.
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the module as small as the checkpoint's, before its weights are loaded."""
        assert isinstance(self, nn.Module)
        shrink_to_(self, checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
