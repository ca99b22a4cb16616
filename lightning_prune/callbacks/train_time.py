"""Pruning while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch.optim import Optimizer

from lightning_prune.callbacks.ownership import check_as_traced
from lightning_prune.callbacks.soft_masking import SoftMasking
from lightning_prune.callbacks.states import restoring
from lightning_prune.callbacks.stepping import true_gradients
from lightning_prune.callbacks.structure import averaged_models, check_can_shrink
from lightning_prune.core.budgets import Budget
from lightning_prune.core.criteria import check_can_train
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Weight
from lightning_prune.core.recipe import Recipe, checked_shrink
from lightning_prune.core.regularizers import checked_regularizer
from lightning_prune.core.schedules import Polynomial
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.types import (
    Couples,
    Criterion,
    Granularity,
    Masking,
    Regularizer,
    Schedule,
    Scope,
)
from lightning_prune.core.windows import Window
from lightning_prune.model.averages import Verdict
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.optimizer import parameter_ids
from lightning_prune.model.regularizing import regularize_, scales_of

DECAYED = 0.3  # of the peak learning rate: below it, a network hardly recovers from what is pruned


class TrainTimePruning(SoftMasking):
    """Prune during training: sparsity ramps up, and pruned weights are zero after each optimizer step.

    `Trainer(callbacks=[TrainTimePruning(sparsity=0.9)])` is gradual pruning, Zhu & Gupta 2017 (arXiv:1710.01878), by
    global magnitude over the first 70 % of the run; every noun can be exchanged. Parameters keep their names and
    class, checkpoints hold plain weights that are zero where they are pruned, and a resumed run goes on bit for bit.

    A step, here and in `window`, is a training batch on which an optimizer of a pruned weight was to step. Keep the
    learning rate high while the sparsity rises and let it decay after.

    Cost: one byte per weight, a few percent of a step, or less than none at high sparsity (`compact`), and the
    criterion's statistics at each update.

    When: there is a training to prune in; nothing else reaches its accuracy at high sparsity.

    Args:
        sparsity: fraction of the groups removed in the end, in [0, 1); numbers by name pattern; None where the scope
            prescribes it.
        schedule: progress through the window -> fraction of `sparsity`, both in [0, 1].
        criterion: how good each weight is.
        granularity: what goes as one piece.
        scope: who competes with whom.
        window: when masks are updated.
        include: patterns or module types to prune; by default the linear, convolution and attention weights that are
            trained: stepped by an optimizer and not frozen when fitting starts.
        exclude: patterns or module types to leave out.
        report: whether to write `report.json` and `report.md` beside the run.
        shrink: for coupled granularities (`Channel`, `Head`), when what is masked is taken out of the model for real:
            at the "end" of the ramp (the default), with each "update", so that training gets faster as the model gets
            smaller, or "never".
        budget: for coupled granularities, what the smaller model may cost, in place of `sparsity`.
        masking: what becomes of pruned weights until the window ends, for granularities of single tensors: None leaves
            them at zero; with `StraightThrough` or `Dormant` their values live on beside the model and may come back.
        regularizer: for coupled granularities, a penalty that drives groups towards zero until the window ends.
        compact: whether optimizers step the surviving weights alone where that is faster (very sparse, on CPU): same
            result, cheaper steps, less memory; `optimizer.state` holds vectors of the survivors meanwhile.

    Raises:
        ValueError: a value out of its range, at once; what does not fit model or trainer, before the first step.

    Example:
        >>> from lightning_prune import Linear, TrainTimePruning, Window
        >>> pruning = TrainTimePruning(sparsity=0.9, schedule=Linear(), window=Window(end=0.5), exclude=["head"])
        >>> pruning.describe()["schedule"]
        'Linear()'
    """

    kind = "train_time"
    can_shard = True

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        schedule: Schedule = Polynomial(),
        criterion: Criterion = Magnitude(),
        granularity: Granularity | Couples = Weight(),
        scope: Scope = Global(),
        window: Window = Window(),
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] = (),
        report: bool = True,
        shrink: str | None = None,
        budget: Budget | None = None,
        masking: Masking | None = None,
        regularizer: Regularizer | None = None,
        compact: bool = True,
    ) -> None:
        recipe = Recipe(sparsity, criterion, granularity, scope, include, exclude, budget)
        super().__init__(
            recipe, masking=masking, schedule=schedule, window=window, report=report, compact=compact
        )
        check_can_train(criterion)
        self.shrink = checked_shrink(shrink, granularity)
        self.regularizer = checked_regularizer(regularizer, granularity)
        self.shrinks = self.shrink in ("end", "update")
        self._peak_lr, self._is_to_shrink, self._is_to_go_on_shrinking = 0.0, False, False
        self._awaited: set[str] = set()

    @property
    def unguarded(self) -> str | None:
        """Why updates cannot be undone: pruned weights are not zero at once, or pieces of the model are taken out."""
        if isinstance(granularity := self.recipe.granularity, Couples):
            return (
                f"whose granularity, {granularity}, takes pieces out for good: its `min_keep` is the minimum"
            )
        if self.masking is not None:
            return f"whose masking, {self.masking}, lets weights come back"
        return super().unguarded

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        own = {"shrink": self.shrink, "regularizer": self.regularizer}
        return super().describe() | {name: str(value) for name, value in own.items() if value is not None}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose sparsity, or could not follow a model that becomes smaller.

        Raises:
            ValueError: a strategy that shards the weights, or whose processes could not follow.
        """
        super().setup(trainer, pl_module, stage)
        if self.shrinks and stage == "fit":
            check_can_shrink(trainer, str(self.shrink))

    def _go_on(self) -> None:
        """Go on from the learning rate that was seen, too."""
        with restoring(self):
            self._peak_lr = float(self._before["peak_lr"]) if self._before is not None else 0.0
            self._is_to_go_on_shrinking = bool((self._before or {}).get("is_to_shrink"))
        super()._go_on()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *rest: Any
    ) -> None:
        """Watch activations where an update is near, and see once which submodules are averages of others.

        Raises:
            ValueError: an average that could not follow a smaller model, or a budget that is out of reach, now that it
                is known what follows.
        """
        if isinstance(self.pruner, GroupPruner) and self.pruner.copies.check():
            self.pruner.check_reach(Verdict.OPEN)
        super().on_train_batch_start(trainer, pl_module, batch, *rest)
        self._go_on_shrinking_(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take out, too, what a checkpoint of the last step still had."""
        super().on_train_end(trainer, pl_module)
        self._go_on_shrinking_(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note gradients, and add to them what the regularizer asks for until the ramp is over."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        pruner, penalty = self.pruner, self.regularizer
        if penalty is None or not isinstance(pruner, GroupPruner) or self._ramp.is_over:
            return
        scales = scales_of(pl_module)
        ids = parameter_ids([optimizer])
        with true_gradients(trainer, optimizer):
            regularize_(penalty, pruner.contest.groups, pruner.targets, scales, ids)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """See which copies within the module are trained, and so no averages, while that may still tell."""
        if isinstance(self.pruner, GroupPruner) and not self._ramp.is_over:
            self.pruner.copies.note_gradients()
        super()._after_step(optimizer, args, kwargs)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take out what is masked, where the time has come."""
        self._take_out_(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module)

    def _take_out_(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_to_shrink and not self._is_waiting():
            check_as_traced(self._pruner)
            self._mask_averages_(trainer)
            self._shrink_(trainer, pl_module, self._optimizers, averaged_models(trainer))
        self._is_to_shrink = False

    def _go_on_shrinking_(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take out what was due when a checkpoint was saved, between an update and the end of its batch."""
        if self._is_to_go_on_shrinking:
            self._is_to_go_on_shrinking, self._is_to_shrink = False, True
            self._take_out_(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return masks, steps, updates and nouns, safe under `torch.load(weights_only=True)`."""
        state = super().state_dict()
        if self.ramp is None:
            return state
        if self.pruner is None and self._before is not None:  # nothing of it was taken over yet
            return state
        is_to_shrink = self._is_to_shrink or self._is_to_go_on_shrinking
        return {**state, "peak_lr": self._peak_lr, "is_to_shrink": is_to_shrink}

    def _after_update(self) -> None:
        self._is_to_shrink = self.shrink == "update" or (self.shrink == "end" and self._ramp.is_over)
        self._check_learning_rate()

    def _is_waiting(self) -> bool:
        """Whether the model stays as it is until a later update, before which a copy may show that it follows."""
        pruner = self.pruner
        if self._ramp.is_over or not isinstance(pruner, GroupPruner) or not pruner.masks:
            return False
        awaited = pruner.awaited
        for path in awaited.keys() - self._awaited if pruner.copies.is_seen else ():
            self._awaited.add(path)
            self._warn(
                f"`{path}` has the values of `{awaited[path]}`, or nearly, and has not changed yet: the model becomes "
                "smaller once it has, as an average does, or else when the ramp ends. Name it in `exclude` if it is a "
                "teacher that stays as it is."
            )
        return bool(awaited)

    def _check_learning_rate(self) -> None:
        lr = max(float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups)
        self._peak_lr = max(self._peak_lr, lr)
        if self._ramp.is_over and lr < DECAYED * self._peak_lr:
            self._warn(
                f"The learning rate had fallen to {lr / self._peak_lr:.0%} of its peak when the sparsity ramp ended "
                f"(step {self._ramp.num_steps}), too low to recover from the last updates. Keep it constant until the "
                "ramp ends and let it decay after, or end the ramp earlier: window=Window(end=...)."
            )
