"""Whose weights are whose: callbacks prune weights of their own, and those stay in the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import lightning as L
from torch import nn

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.core.granularities import Layer
from lightning_prune.core.patterns import listed
from lightning_prune.core.types import Name
from lightning_prune.model.calls import replaying
from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shrinking import AnyPruner

AFTERWARDS = "fit with {0} alone, and call PostTrainingPruning.run(trainer, model) afterwards"
APART = "tell them apart by `include` and `exclude`"


def check_alone(callback: PruningCallback, trainer: L.Trainer, pruner: AnyPruner | None = None) -> None:
    """Refuse weights that another callback holds masks of, if these would be undone, or cut to another sparsity.

    Args:
        callback: that prunes.
        trainer: of all callbacks.
        pruner: of what the callback prunes; by default its own.

    Raises:
        ValueError: there are such weights.
    """
    pruner = pruner or callback.pruner
    assert pruner is not None
    ours = {id(parameter): name for name, parameter in pruner.targets.items()}
    for other in partners(callback, trainer):
        if other.pruner is None or (advice := _advice(callback, other)) is None:
            continue
        if shared := [ours[id(p)] for p in other.pruner.targets.values() if id(p) in ours]:
            raise ValueError(
                f"`callbacks` prune weights of their own each, but got {_shown(other)} and {_shown(callback)} for "
                f"{listed(shared)}: {advice}.{_said_of_inputs(shared, (pruner, other.pruner))}"
            )


def check_same_size(callback: PruningCallback, trainer: L.Trainer, why: str) -> None:
    """Refuse a model that becomes smaller in training where a callback loads weights of before.

    Args:
        callback: that loads them.
        trainer: of all callbacks.
        why: what it does.

    Raises:
        ValueError: another callback makes the model smaller.
    """
    for other in partners(callback, trainer):
        if other.shrinks:
            raise ValueError(
                f"`callbacks` has {_shown(callback)}, which {why}, but got {_shown(other)}, which makes the model "
                "smaller meanwhile: set its shrink='never', or use one after the other in two fits."
            )


def partners(callback: PruningCallback, trainer: L.Trainer) -> Iterator[PruningCallback]:
    """Yield the other callbacks that prune."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, PruningCallback) and other is not callback:
            yield other


def mask_all_(callback: PruningCallback, trainer: L.Trainer) -> None:
    """Mask what other callbacks hold masks of, once a callback has loaded weights."""
    for other in partners(callback, trainer):
        if other.holds_masks and other.pruner is not None:
            other.pruner.apply_()


def _advice(callback: PruningCallback, other: PruningCallback) -> str | None:
    """Say what to do where the same weights cannot be pruned by both; None where they can."""
    if callback.holds_masks and other.holds_masks:
        return APART
    has_masks = other.holds_masks and not other.shrinks
    if callback.turn == 2 and has_masks:  # the model becomes smaller after training
        is_whole = isinstance(callback.recipe.granularity, Layer)
        return (
            AFTERWARDS.format(type(other).__name__) if is_whole or isinstance(other.pruner, Pruner) else None
        )
    if callback.turn == 0 and has_masks and isinstance(other.pruner, Pruner) and other.pruner.masks:
        return "masks that a checkpoint holds are of the larger model; go on with the callbacks that wrote it"
    return None


def _said_of_inputs(shared: Sequence[Name], pruners: Iterable[AnyPruner]) -> str:
    """Say which weights are shared only because they read channels that another callback takes out."""
    for pruner in pruners:
        if isinstance(pruner, GroupPruner):
            read = {
                name: member.tensor
                for name, group in pruner.contest.groups.items()
                for member in group.members
                if member.tensor in shared and member.tensor not in pruner.outputs
            }
            if read:
                what = listed(f"`{reader}` reads `{name}`" for name, reader in read.items())
                return f" Of coupled channels, {what}: leave out what is read."
    return ""


def _shown(callback: PruningCallback) -> str:
    return f"{type(callback).__name__}(granularity={callback.recipe.granularity})"


def check_there(module: nn.Module, targets: Mapping[Name, nn.Parameter]) -> None:
    """See that a module still has what is pruned.

    Raises:
        ValueError: a module was replaced or removed, whose masks would be lost without a word.
    """
    here = {id(parameter) for parameter in module.parameters()}
    _refuse([name for name, parameter in targets.items() if id(parameter) not in here])


def _running(pruner: GroupPruner | DepthPruner, modules: list[nn.Module]) -> set[nn.Module]:
    """Return which of some modules run in a call of the model; all of them where it fails with them."""
    found: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(lambda module, _: found.add(module)).remove)
        again = stack.enter_context(replaying(pruner.model, pruner.call))
        try:
            again()
        except Exception:  # whatever a model raises that is of other sizes by now
            return set(modules)
    return found


def _refuse(gone: list[Name]) -> None:
    if gone:
        raise ValueError(
            f"`{gone[0]}` is pruned, but was taken out of the module or replaced in it since: change modules before "
            "fitting starts, or exclude them."
        )


def check_as_traced(pruner: AnyPruner) -> None:
    """See that a model whose layers are coupled still runs those that it ran when that was seen.

    Raises:
        ValueError: a layer was added since, or a pruned one has another name.
    """
    if isinstance(pruner, Pruner):
        return
    check_there(pruner.model, pruner.targets)
    known = pruner.couplings.run.paths
    new = [module for module in pruner.call.module.modules() if module not in known and module._parameters]
    ran = _running(pruner, new) if new else set()
    if added := [path for path, module in pruner.model.named_modules() if module in ran]:
        raise ValueError(
            f"`{added[0]}` runs in the model, but was added to it after what is coupled there was found: add modules "
            "before fitting starts, or fit once without pruning, add them, and prune in a second fit."
        )
    here = dict(pruner.model.named_parameters())
    _refuse([name for name, parameter in pruner.targets.items() if here.get(name) is not parameter])
