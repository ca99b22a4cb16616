"""Optimizers whose steps masks follow: hooked on to, stepped on the survivors alone, and noticed when exchanged."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import lightning as L
from torch.optim import Optimizer

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.run_length import placed
from lightning_prune.callbacks.states import restoring
from lightning_prune.callbacks.structure import averaged_models
from lightning_prune.core.checks import check_flag
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import Masks
from lightning_prune.model.compact import CompactOptimizers
from lightning_prune.model.optimizer import mask_state_, parameter_ids, unscaled
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shrinking import AnyPruner


class Stepping(PruningCallback):
    """Base of the callbacks that act after the steps of optimizers; `_after_step` says what is done.

    Args:
        recipe: what is pruned.
        report: as for `PruningCallback`.
        compact: whether optimizers step the surviving weights alone where that is faster.
    """

    def __init__(self, recipe: Recipe, *, report: bool, compact: bool) -> None:
        super().__init__(recipe, report=report)
        self.compact = check_flag("compact", compact)
        self._compact, self._hooks = CompactOptimizers(), ExitStack()
        self._optimizers: list[Optimizer] = []
        self._seen: list[Optimizer] = []
        """All of the trainer's, when hooks were set; none where they have to be set anew."""
        self._num_groups: list[int] = []
        """How many groups of parameters each of them had."""
        self._seen_at: tuple[int, int] | None = None
        """The epoch and the global step of the call that shows what is coupled."""

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Act after a step of one of the optimizers; torch's arguments of a hook."""
        raise NotImplementedError

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind, and optimizers as they were."""
        self._hooks.close()
        if self.pruner is not None and not isinstance(self.pruner, Pruner):
            self.pruner.copies.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Leave no hook behind."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback holds, and where in the run it has seen what is coupled."""
        state = super().state_dict()
        return state if self.pruner is None or self._seen_at is None else {**state, "seen_at": self._seen_at}

    def _take_state(self, pl_module: L.LightningModule) -> dict[str, Any] | None:
        """Return the state to go on from, and take from it where a call showed what is coupled."""
        state, self._seen_at = super()._take_state(pl_module), None
        if state is not None and "seen_at" in state:
            with restoring(self):
                epoch, step = state["seen_at"]
                self._seen_at = int(epoch), int(step)
        return state

    def _coupled(self, trainer: L.Trainer, *args: Any) -> AnyPruner:
        """Return the pruner of coupled groups, as a step shows them at the place in the run where it first did."""
        with placed(trainer, self._seen_at) as self._seen_at:
            return super()._coupled(trainer, *args)

    def _hook_on(self, trainer: L.Trainer) -> None:
        """Let masks hold after the steps of all optimizers that step pruned weights."""
        self._hooks.close()
        self._optimizers = self._seen = list(trainer.optimizers)
        self._num_groups = _num_groups(trainer)
        if isinstance(self.pruner, Pruner):
            targets = {id(parameter) for parameter in self.pruner.targets.values()}
            self._optimizers = [o for o in trainer.optimizers if parameter_ids([o]) & targets]
        for optimizer in self._optimizers:
            self._hooks.callback(optimizer.register_step_post_hook(self._after_step).remove)
        if self.compact and isinstance(self.pruner, Pruner) and self.pruner.can_compact:
            self._compact = CompactOptimizers(self._optimizers)
            self._hooks.callback(self._compact.close)

    def _notice_optimizers(self, trainer: L.Trainer, stepping: Optimizer | None = None) -> None:
        """Hook on to optimizers that were put in the place of others, even in the middle of their first step.

        That step exchanges nothing: it has begun already. One of the others that is about to step does so first.
        """
        is_known = trainer.optimizers == self._seen and _num_groups(trainer) == self._num_groups
        if is_known or (stepping and stepping not in trainer.optimizers):
            return
        self._hook_on(trainer)
        if self.pruner is not None:
            mask_state_(self._optimizers, self.pruner.targets, self._settled)
        if stepping is not None:
            self._compact.close()
            self._seen = []

    @property
    def _settled(self) -> Masks:
        """The masks of what lives on nowhere, so that optimizers need remember nothing of it."""
        return self._pruner.masks

    @property
    def _pruner(self) -> AnyPruner:
        assert self.pruner is not None
        return self.pruner

    def _forget(self) -> None:
        """Give optimizers their whole state back, and let them remember nothing of what is pruned."""
        self._compact.release()
        mask_state_(self._optimizers, self._pruner.targets, self._settled)

    def _mask_averages_(self, trainer: L.Trainer) -> None:
        for model in averaged_models(trainer):
            self._pruner.apply_to_(model)


def true_gradients(trainer: L.Trainer, optimizer: Optimizer) -> AbstractContextManager[None]:
    """Let gradients be those of the loss, without the scale of 16 bits, while they are read or added to."""
    return unscaled(optimizer, getattr(trainer.precision_plugin, "scaler", None))


def _num_groups(trainer: L.Trainer) -> list[int]:
    return [len(optimizer.param_groups) for optimizer in trainer.optimizers]
