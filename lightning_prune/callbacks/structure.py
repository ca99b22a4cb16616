"""Models that become smaller in a run: how a smaller one is loaded, and how the processes follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_prune.callbacks.evaluation import reads_once
from lightning_prune.callbacks.monitor import SparsityMonitor
from lightning_prune.callbacks.own_steps import silenced, step_of
from lightning_prune.graph.sandbox import mode_of_training
from lightning_prune.model.calls import Call, undisturbed
from lightning_prune.model.joint_calls import as_one, capture_step, is_all_reached, joined, parts_of
from lightning_prune.model.record import HOOK, shrunk_to


class SeesDense:
    """A callback that looks at a module before a checkpoint makes it smaller."""

    def see_dense_(self, module: L.LightningModule) -> None:
        """Look at the module, which is as it was built."""
        raise NotImplementedError


class Shrinks:
    """Stands in for a module's `on_load_checkpoint`, and makes it as small as the checkpoint's first.

    Args:
        module: what is loaded.
        inner: what stood in for the hook before, or None.
    """

    def __init__(self, module: L.LightningModule, inner: Any) -> None:
        self.module, self.inner = module, inner

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Replay the record, on averages of the weights too, then do what the module does.

        The weights are loaded right after that. Where they do not fit, the module is as it was.
        """
        for callback in self.module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SeesDense):
                callback.see_dense_(self.module)
        with shrunk_to(self.module, checkpoint, averaged_models(self.module.trainer)):
            if self.module.trainer.state.fn != TrainerFn.FITTING:
                _without_report(checkpoint, self.module.trainer)
            if self.inner is not None:
                self.inner(checkpoint)
            else:
                type(self.module).on_load_checkpoint(self.module, checkpoint)


def _without_report(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Leave out the state of the monitor that a run has added by itself, which Lightning would ask the user to add."""
    monitors = [cb for cb in trainer.callbacks if isinstance(cb, SparsityMonitor)]  # type: ignore[attr-defined]
    states = checkpoint.get("callbacks")
    if not monitors and isinstance(states, dict):
        states.pop(SparsityMonitor.__qualname__, None)


def follow_record_(module: L.LightningModule) -> None:
    """Let a module become as small as a checkpoint that the trainer loads into it.

    Lightning gives callbacks a checkpoint only after the weights are loaded; the module's own hook comes before. That
    checkpoints have a record is the module's own doing, once it has become smaller (`model.history`).
    """
    own = vars(module)
    if not isinstance(own.get(HOOK), Shrinks):
        own[HOOK] = Shrinks(module, own.get(HOOK))


def check_can_shrink(trainer: L.Trainer, shrink: str) -> None:
    """Refuse strategies whose processes cannot follow a model that becomes smaller.

    Raises:
        ValueError: several processes by another strategy than DDP, ones that are spawned or forked, of which only
            weights come back, or DDP with a communication hook.
    """
    strategy, advice = (
        trainer.strategy,
        "train with strategy='ddp', or with shrink='never' and shrink it afterwards.",
    )
    check_comes_back(trainer, f"`shrink` is {shrink!r}", advice)
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise ValueError(
            f"`shrink` is {shrink!r} on one device or with DDP, but got {type(strategy).__name__}: {advice}"
        )
    if isinstance(strategy, DDPStrategy) and strategy._ddp_comm_hook is not None:
        raise ValueError(
            f"`shrink` is {shrink!r} with DDP's own reduction, but got a communication hook, which may keep gradients "
            f"of the larger model: leave it out, or {advice}"
        )


def check_comes_back(trainer: L.Trainer, what: str, advice: str) -> None:
    """Refuse processes that train a copy of the model, which becomes smaller without the trainer's own.

    Raises:
        ValueError: they are spawned or forked by the trainer.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{what} where the model that is trained is the trainer's own, but got processes that are started by "
            f"{launcher._start_method!r}, of which weights of the same shapes alone come back: {advice}"
        )


def rewrap_(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Wrap a module anew that has become smaller: DDP keeps buckets of its parameters' sizes.

    Without this, processes diverge: gradients are no longer averaged.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy.model is not module:
        strategy.model = strategy._setup_model(module)


@dataclass(frozen=True)
class Shown:
    """What the steps of a module have shown on some batches.

    Args:
        call: of the model, several as one; None where the steps made none.
        batches: that were tried, in their order.
        telling: those of them that the call was made for.
    """

    call: Call | None
    batches: list[Any]
    telling: list[Any]


def example_call(trainer: L.Trainer, module: L.LightningModule, batches: Iterable[Any]) -> tuple[Call, Shown]:
    """Return the calls of the model that the module's own step makes for some batches; those of one process for all.

    Args:
        trainer: whose processes they are.
        module: the whole model.
        batches: as for `see_calls`.

    Returns:
        The call, and what was seen by this process.

    Raises:
        ValueError: the step calls no submodule with parameters.
    """
    is_alone = trainer.world_size == 1
    agree = bool if is_alone else trainer.strategy.broadcast
    shown = see_calls(module, batches, agree, is_thrifty=trainer.training and reads_once(trainer))
    call = shown.call if is_alone else _of_first(trainer, module, shown.call)
    if call is None:
        raise ValueError(
            f"`granularity` of coupled groups follows a call of the model, but a step of {type(module).__name__} "
            f"called no module that has parameters, for none of {len(shown.batches)} batches. What runs under "
            "torch.func, as with vmap, is not followed."
        )
    return call, shown


def _of_first(trainer: L.Trainer, module: L.LightningModule, call: Call | None) -> Call | None:
    """Return the call that the first process has seen."""
    facts: Any = None
    if call is not None:
        paths = {part: path for path, part in module.named_modules()}
        ran = None if call.ran is None else [path for part, path in paths.items() if part in call.ran]
        names = [paths[part] for part in parts_of(call.module)]
        facts = names, (call.args, dict(call.kwargs)), call.autocast, ran, call.is_training
    facts = trainer.strategy.broadcast(facts)
    if facts is None:
        return None
    names, arguments, autocast, ran, is_training = facts
    args, kwargs = trainer.strategy.batch_to_device(arguments, dataloader_idx=0)
    called = joined([module.get_submodule(name) for name in names])
    modules = None if ran is None else {module.get_submodule(path) for path in ran}
    return Call(called, args, kwargs, autocast, modules, is_training)


def see_calls(
    module: L.LightningModule,
    batches: Iterable[Any],
    agree: Callable[[bool], bool] = bool,
    *,
    is_thrifty: bool = False,
) -> Shown:
    """See which calls a module's own steps make, on the first batch for which there are any.

    Where something that is trained did not run, as another task's head, more batches are looked at, and calls are taken
    along that run what had not run before. An error tells nothing there.

    Args:
        module: the whole model.
        batches: the steps may skip some.
        agree: whether one process has seen enough -> whether all have, which run the same number of steps.
        is_thrifty: whether to look at no more batches than the first for which there is a call.
    """
    calls, tried, telling = list[Call](), list[Any](), list[Any]()
    waiting, end = iter(batches), object()
    while True:
        if (batch := next(waiting, end)) is not end:
            tried.append(batch)
            with suppress(Exception) if calls else nullcontext():
                call = call_of_step(module, batch, tried)
                if call is not None and not (calls and _ran(calls).issuperset(call.ran or ())):
                    calls.append(call)
                    telling.append(batch)
        if agree(batch is end or (is_thrifty and bool(calls)) or _is_enough(module, calls)):
            return Shown(as_one(calls) if calls else None, tried, telling)


def _is_enough(module: L.LightningModule, calls: Sequence[Call]) -> bool:
    is_seen = all(call.ran is not None for call in calls)
    return bool(calls) and (not is_seen or is_all_reached(module, _ran(calls)))


def _ran(calls: Iterable[Call]) -> set[nn.Module]:
    return {part for call in calls for part in call.ran or ()}


def call_of_step(module: L.LightningModule, batch: Any, batches: Sequence[Any] = ()) -> Call | None:
    """Return the call of the model that the module's own step makes for a batch, or all its calls as one.

    The module runs in eval mode. A step may fail there, since a module gives in training what it does not give else, as
    auxiliary outputs; or something that is trained may only run in training. Then it is the call in that mode.

    Args:
        module: the whole model.
        batch: one of `batches`, whose place is its `batch_idx`.
        batches: as for `step_of`.

    Returns:
        The call; None if there is none.
    """
    try:
        call = _call_seen(module, batch, batches, is_training=False)
    except Exception:
        return _call_seen(module, batch, batches, is_training=True)
    if call is not None and call.ran is not None and not is_all_reached(module, call.ran):
        with suppress(Exception):
            told = _call_seen(module, batch, batches, is_training=True)
            if told is not None and _trained(told) > _trained(call):
                return told
    return call


def _call_seen(
    module: L.LightningModule, batch: Any, batches: Sequence[Any], *, is_training: bool
) -> Call | None:
    step, mode = step_of(module, batches), mode_of_training(module.modules(), is_training)
    with undisturbed(module), silenced(module), mode, capture_step(module) as caught:
        step(module, batch)
    if (call := caught.call) is None:
        return None
    is_seen = module.automatic_optimization  # or else what ran is a step of validation
    return replace(call, ran=call.ran if is_seen else None, is_training=is_training)


def _trained(call: Call) -> set[nn.Module]:
    """Return which modules that have trained parameters of their own have run."""
    return {m for m in call.ran or () if any(p.requires_grad for p in m.parameters(recurse=False))}


def restart_averages_(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let weight-averaging callbacks begin anew with the module's weights, as at the start of a training."""
    copy_to_averages_(trainer, module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._average_model.n_averaged.zero_()


@torch.no_grad()
def copy_to_averages_(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Give the averages that callbacks keep the module's own values, as far as they are of the same tensors."""
    own = _tensors_by_name(module)
    for average in averaged_models(trainer):
        for name, tensor in _tensors_by_name(average).items():
            if name in own and own[name].shape == tensor.shape:
                tensor.copy_(own[name])


def averaged_models(trainer: L.Trainer) -> list[nn.Module]:
    """Return the copies that weight-averaging callbacks keep of the module."""
    found: list[nn.Module] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            found.append(callback._average_model)
        elif isinstance(callback, WeightAveraging) and callback._average_model is not None:
            found.append(callback._average_model.module)
    return found


def _tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, also those that are in no state dict."""
    return dict(
        (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    )
