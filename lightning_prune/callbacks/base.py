"""What the pruning callbacks share: checks of the trainer, their place among the callbacks, warnings, updates."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import nn
from torch.optim import Optimizer

from lightning_prune.callbacks.command_line import teach_jsonargparse
from lightning_prune.callbacks.files import keep_files_whole_
from lightning_prune.callbacks.interruption import LATENCIES, local_folder_of
from lightning_prune.callbacks.monitor import SparsityMonitor
from lightning_prune.callbacks.random_state import RandomState
from lightning_prune.callbacks.small_steps import keep_what_steps_need
from lightning_prune.callbacks.states import check_seal, restoring, seal_
from lightning_prune.callbacks.strategies import check_strategy
from lightning_prune.callbacks.structure import example_call, follow_record_, rewrap_
from lightning_prune.core.checks import check_flag
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import Masks
from lightning_prune.graph import Plan
from lightning_prune.model.copies import copied
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.prices import Measured
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.ranks import check_agreement
from lightning_prune.model.shortfall import said_of_thin, shortfall
from lightning_prune.model.shrinking import AnyPruner, pruner_of, sparsities_of
from lightning_prune.model.unpruned import modules_not_run
from lightning_prune.report.progress import showing

teach_jsonargparse()
STATE_VERSION = 1


class PruningCallback(L.Callback):
    """Base of the pruning callbacks; it prunes nothing by itself.

    Args:
        recipe: what is pruned.
        report: whether a report of the run is written, by a `SparsityMonitor` that is added if there is none.
    """

    kind: ClassVar[str]
    can_shard: ClassVar[bool] = False
    """Whether weights may be spread over processes, as DTensors."""
    holds_masks: bool = False
    """Whether masks hold while a model trains."""
    shrinks: bool = False
    """Whether the model becomes smaller between two steps."""
    turn: int = 1
    """Whose turn is first: 0 makes the model smaller before training, 2 after it, and 3 prunes what is left then."""

    def __init__(self, recipe: Recipe, *, report: bool) -> None:
        self.recipe, self.report = recipe, check_flag("report", report)
        self.pruner: AnyPruner | None = None
        self.dense: nn.Module | None = None
        self.updates: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.metrics_before: dict[str, float] = {}
        self.metrics_after: dict[str, float] = {}
        self.path: str | None = None
        self._loaded: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """One state for each set of targets, so that several callbacks can prune parts of one model."""
        if self.recipe.include is None and not self.recipe.exclude:
            return type(self).__qualname__
        return self._generate_state_key(include=str(self.recipe.include), exclude=str(self.recipe.exclude))

    @property
    def masks(self) -> Masks:
        """The masks of the pruned weights by name, True is kept; empty before the first update.

        They lie where the weights lie, which Lightning moves to the CPU after a run on a GPU, and are spread over
        processes as the weights are: DTensors where those are.
        """
        if self.pruner is None:
            return {}
        placed = self.pruner.shards.placed if isinstance(self.pruner, Pruner) else dict
        masks, targets = placed(self.pruner.masks), self.pruner.targets
        return {name: mask.to(targets[name].device) for name, mask in masks.items()}

    @property
    def is_final(self) -> bool:
        """Whether the final sparsity is reached, as far as training has to do with it."""
        return True

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        return self.recipe.describe()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose sparsity, take the place behind callbacks that average weights, and keep files whole.

        Raises:
            ValueError: a strategy under which masks would be lost.
        """
        check_strategy(trainer.strategy, self)
        keep_files_whole_(trainer)
        if not self._is_of(pl_module):
            self.dense = None  # of another module, trained before
        follow_record_(pl_module)
        self._arrange(trainer, pl_module, stage)

    def _arrange(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add what goes with pruning, and order the callbacks: those that average, pruning, the monitor, checkpoints.

        Who makes the model smaller before training, prunes first; who does so after it, after those that hold masks.
        Lightning walks the list at this moment, so a new one takes its place.
        """
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        wanted = (RandomState, SparsityMonitor) if self.report and stage == "fit" else (RandomState,)
        for kind in wanted:
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks = [*callbacks, added := kind()]
                added.setup(trainer, pl_module, stage)
        pruning = sorted((cb for cb in callbacks if isinstance(cb, PruningCallback)), key=lambda cb: cb.turn)
        late = [cb for kind in (SparsityMonitor, Checkpoint) for cb in callbacks if isinstance(cb, kind)]
        others = [cb for cb in callbacks if cb not in (*pruning, *late)]
        trainer.callbacks = [*others, *pruning, *late]  # type: ignore[attr-defined]

    def _update_(self, fraction: float, **when: Any) -> None:
        """Let the pruner compute and apply new masks, and write down what came of it."""
        assert self.pruner is not None
        with showing():
            self.pruner.update_(fraction)
        if isinstance(self.pruner, GroupPruner) and self.pruner.contest.solved is not None:
            self.pruner.contest.measured.forget()
        self._note_update(fraction, **when)

    def _note_update(self, fraction: float, **when: Any) -> None:
        """Write down what an update has come to, once all processes have come to the same."""
        assert self.pruner is not None
        update = {**when, "requested": self.pruner.requested, "achieved": self.pruner.sparsity}
        update["layers"] = sparsities_of(self.pruner)
        self._check_agreement({"the record of the update": update})
        self.updates.append(update)
        if fraction >= 1.0:
            self._warn(*(said for said in (shortfall(self.pruner), said_of_thin(self.pruner)) if said))

    def _coupled(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batches: Iterable[Any],
        trained: Container[int] | None = None,
    ) -> AnyPruner:
        """Return the pruner of coupled groups, which show in a call of the model; all processes go by the first."""
        call, shown = example_call(trainer, module, batches)
        for monitor in self._monitors(trainer):
            monitor.note_call(trainer, module, call)
        pruner = pruner_of(module, self.recipe, call, trained)
        if trainer.world_size > 1 and not isinstance(pruner, Pruner):
            pruner.agree = pruner.copies.agree = trainer.strategy.broadcast
        if isinstance(pruner, GroupPruner) and (self.shrinks or self.turn != 1) and self._before is None:
            self._warn(*keep_what_steps_need(module, pruner, shown))
        self._warn(*modules_not_run(pruner))
        if isinstance(pruner, GroupPruner) and (folder := local_folder_of(trainer)) is not None:
            pruner.contest.measured = Measured(folder / LATENCIES)
        if not isinstance(pruner, Pruner) and (self.shrinks or self.turn == 0):
            pruner.copies.watch(trains_on=True)
        return pruner

    def _shrink_(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        optimizers: Iterable[Optimizer] = (),
        copies: Iterable[nn.Module] = (),
    ) -> None:
        """Take out what is masked, and say which groups could not follow."""
        assert self.pruner is not None and not isinstance(self.pruner, Pruner)
        self._keep_dense(trainer, self.pruner.call.module)
        known = dict(self.pruner.frozen)
        with showing():
            plan = self.pruner.shrink_(optimizers, copies)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PruningCallback) and other is not self and not plan.is_empty:
                other._follow_(trainer, module, plan)
        rewrap_(trainer, module)
        if self.updates:
            self.updates[-1]["achieved"] = self.pruner.sparsity
        for name, reason in self.pruner.frozen.items() - known.items():
            self._warn(f"`{name}` stays whole: {reason}.")
        self._warn(*(() if plan.is_empty else self.pruner.copies.notes))

    def _keep_dense(self, trainer: L.Trainer, called: nn.Module) -> None:
        """Keep a copy of what is called before it becomes smaller, on the CPU, where a report compares latencies.

        Where the report has seen another call, as one of validation, that is the one it compares.
        """
        comparing = [monitor for monitor in self._monitors(trainer) if monitor.latency]
        if self.dense is None and comparing:
            try:
                self.dense = copied(comparing[0].called or called).cpu()
            except Exception as error:  # whatever a user's module does when it is copied
                self._warn(
                    f"The report compares no latency with the dense model, which cannot be copied: {error!r:.200}."
                )

    def _follow_(self, trainer: L.Trainer, module: L.LightningModule, plan: Plan) -> None:
        """Go on with a model that another callback has made smaller."""
        if self.pruner is not None and self.pruner.model is module:
            self.pruner.follow_(plan)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Seal the state, so that a changed one is refused."""
        seal_(self, checkpoint)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume a run whose masks would be forgotten.

        Raises:
            ValueError: the checkpoint holds the state of a callback like this one with other targets, or one that was
                changed.
        """
        check_seal(self, checkpoint)
        states = checkpoint.get("callbacks", {})
        others = [key for key in states if key.startswith(type(self).__qualname__) and key != self.state_key]
        known = {cb.state_key for cb in trainer.callbacks}  # type: ignore[attr-defined]
        if trainer.training and self.state_key not in states and not known.issuperset(others):
            raise ValueError(
                f"`include` and `exclude` are those of the run that is resumed, {others}, but got {self.state_key!r}: "
                "its masks would be lost."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return masks, updates and nouns, safe under `torch.load(weights_only=True)`."""
        if self.pruner is None:
            return self._loaded or {}
        return {
            "version": STATE_VERSION,
            "nouns": self.describe(),
            "updates": list(self.updates),
            "pruner": self.pruner.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a checkpoint; it is put to use when fitting starts.

        Raises:
            ValueError: a newer version of this library wrote it, or it is not whole.
        """
        if (version := state_dict.get("version", 0)) > STATE_VERSION:
            raise ValueError(
                f"`version` of the checkpoint's pruning state is at most {STATE_VERSION}, but got {version}: a newer "
                "lightning_prune wrote it."
            )
        with restoring(self):
            is_begun = (
                "version" in state_dict or "pruner" in state_dict
            )  # of these there are both, or neither
            self._loaded = state_dict if is_begun and state_dict["version"] and state_dict["pruner"] else None

    def _take_state(self, pl_module: L.LightningModule) -> dict[str, Any] | None:
        """Return the state to go on from: a checkpoint's, or one's own where the same module is trained again."""
        own = self.state_dict() if self._is_of(pl_module) else None
        state, self._loaded = self._loaded or own, None
        return state

    def _is_of(self, module: nn.Module) -> bool:
        """Whether what is pruned are parameters of a module."""
        ours = {id(parameter) for parameter in self.pruner.targets.values()} if self.pruner else set()
        return bool(ours) and ours <= {id(parameter) for parameter in module.parameters()}

    def _restore_(self, state: dict[str, Any]) -> None:
        assert self.pruner is not None
        before, now = state["nouns"], self.describe()
        for noun in now | before:
            if (old := before.get(noun)) != (text := now.get(noun)):
                self._warn(f"`{noun}` was {old} in the run that is resumed, and is {text} from now on.")
        self.pruner.load_state_dict(state["pruner"])
        self._check_agreement({"the updates of the checkpoint": state["updates"]})
        self.updates = list(state["updates"])
        self.pruner.apply_()

    def _check_agreement(self, facts: dict[str, Any]) -> None:
        """Refuse to go on where the processes have come to different masks or facts."""
        assert self.pruner is not None
        place = self.pruner.shards.place if isinstance(self.pruner, Pruner) else 0
        check_agreement(self.pruner.masks, facts, place)

    def _finish_report(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for monitor in self._monitors(trainer):
            monitor.finish(trainer, pl_module)

    @staticmethod
    def _monitors(trainer: L.Trainer) -> list[SparsityMonitor]:
        return [cb for cb in trainer.callbacks if isinstance(cb, SparsityMonitor)]  # type: ignore[attr-defined]

    def _warn(self, *messages: str) -> None:
        for message in messages:
            if message not in self.warnings:
                self.warnings.append(message)
            rank_zero_warn(message)
