"""A guard that keeps a layer, or the whole network, from collapsing while sparsity rises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_prune.callbacks.in_training import InTraining
from lightning_prune.callbacks.selection import check_is_logged
from lightning_prune.callbacks.states import restoring
from lightning_prune.core.checks import check_positive, check_sparsity
from lightning_prune.core.directions import checked_mode
from lightning_prune.model.guarding import Guard
from lightning_prune.model.pruning import Pruner

SHORT = 0.005
"""By how much the sparsity may be missed without a word."""


class CollapseGuard(L.Callback):
    """Undo what would kill a layer: an update that leaves too little of it, or after which a metric collapses.

    A layer that an update would leave less than `min_density` of keeps as many weights as it has, and is protected from
    then on: the others make up for it, so that the sparsity of all together stays what the schedule says, as far as
    they can. With `monitor`, a validation metric that is worse than its best by more than `tolerance` rolls back all
    updates since the last validation that was well: what they removed comes back with its value, the layer that had
    lost most of what it had is protected, and the sparsity is asked for anew. Each layer is warned of by name. Its
    state is in every checkpoint, and a resumed run goes on bit for bit.

    It watches a `TrainTimePruning` of weights or of groups within tensors, or a `SparseTraining` whose sparsity rises
    (GraNet). What is coupled across tensors cannot come back; there `min_keep` of `Channel` and `Head` is the minimum.

    Cost: twelve bytes for each weight removed since the last validation, with `monitor` only.

    When: high global sparsities, where a thin layer may die long before the others are thin; `min_keep` of `Global` and
        `Local` is the plain minimum.

    Args:
        min_density: the fraction of a layer's weights below which it is left alone, in [0, 1).
        monitor: the name of a validation metric, or None.
        mode: "max" or "min", what is good of the metric; by default as the words of its name say, "min" of a loss.
        tolerance: how much worse than its best the metric may be, in its own units, above 0.

    Raises:
        ValueError: a value out of its range, at once; no callback that can be guarded, or an unknown metric, in use.

    Example:
        >>> from lightning_prune import CollapseGuard
        >>> CollapseGuard(min_density=0.02, monitor="val/acc", tolerance=0.05).mode
        'max'
    """

    def __init__(
        self,
        min_density: float = 0.01,
        *,
        monitor: str | None = None,
        mode: str | None = None,
        tolerance: float = 0.1,
    ) -> None:
        self.min_density = check_sparsity("min_density", min_density)
        self.mode = checked_mode(monitor or "loss", mode)
        self.monitor, self.tolerance = monitor, check_positive("tolerance", tolerance)
        self.best: float | None = None
        self.protected: list[str] = []
        """Names of the layers, in the order in which they were saved."""
        self._callback: InTraining | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the callback that is guarded.

        Raises:
            ValueError: there is none, or one whose updates cannot be undone.
        """
        if stage != "fit":
            return
        self.best, self.protected, self._loaded = None, [], {}
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [cb for cb in callbacks if isinstance(cb, InTraining)]
        if len(found) != 1:
            raise ValueError(
                "`callbacks` has one TrainTimePruning or SparseTraining with CollapseGuard, but got "
                f"{[type(cb).__name__ for cb in found] or 'none'}."
            )
        if (reason := found[0].unguarded) is not None:
            raise ValueError(
                "`callbacks` has a CollapseGuard only with a callback whose updates can be undone, but got "
                f"{type(found[0]).__name__}, {reason}."
            )
        if self.monitor is not None and trainer.barebones:
            raise ValueError(
                f"`monitor` is None with Trainer(barebones=True), which logs no metrics, but got {self.monitor!r}."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "`strategy` keeps whole weights on each process with CollapseGuard (one device, DDP), but got "
                "ModelParallelStrategy, which shards them: use strategy='ddp'."
            )
        self._callback = found[0]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the pruner from before its first update."""
        pruner, guard = self._pruner, Guard(self.min_density)
        if self._loaded:
            with restoring(self):
                guard.load_state_dict(self._loaded["guard"], pruner.targets)
        else:
            guard.mark(pruner.masks, pruner.requested)
        pruner.guard = guard

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Tell of layers that were about to die."""
        guard = self._guard
        for name, density in guard.news:
            kept = int(guard.held[name].sum()) / guard.held[name].numel()
            self._tell(name, f"an update would have left {density:.2%} of it; it keeps {kept:.2%}")
        guard.news.clear()
        if self.monitor is None:
            guard.removed.clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Roll back what has made the metric collapse.

        Raises:
            ValueError: no such metric.
        """
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        known: Mapping[str, Any] = trainer.callback_metrics
        check_is_logged(self.monitor, known)
        value: float = trainer.strategy.broadcast(float(known[self.monitor]))
        if self._is_well(value):
            is_best = self.best is None or (value > self.best) is (self.mode == "max")
            self.best = value if is_best else self.best
            self._guard.mark(self._pruner.masks, self._pruner.requested)
        elif self._guard.removed and self.best is not None:
            self._roll_back_(value)

    def _is_well(self, value: float) -> bool:
        """Whether a metric is a number, and not much worse than the best that was seen."""
        if self.best is None:
            return math.isfinite(value)
        loss = self.best - value if self.mode == "max" else value - self.best
        return loss <= self.tolerance  # False where it is NaN

    def _roll_back_(self, value: float) -> None:
        assert self._callback is not None
        name = self._callback.roll_back_()
        mask = self._guard.held[name]
        self._tell(
            name,
            f"`{self.monitor}` went from {self.best:.4g} to {value:.4g}, and it had lost most; the updates since then "
            f"are undone, and it keeps {int(mask.sum()) / mask.numel():.2%}",
        )

    def _tell(self, name: str, what: str) -> None:
        assert self._callback is not None
        self.protected.append(name)
        self._callback._warn(
            f"`{name}` is protected from now on, and the other layers make up for it: {what}."
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so where what is protected has cost sparsity."""
        callback = self._callback
        if not self.protected or callback is None or not callback.is_final:
            return
        if (wanted := self._pruner.final_sparsity) - self._pruner.sparsity > SHORT:
            callback._warn(
                f"What CollapseGuard protects could not be made up for by other layers: sparsity is "
                f"{self._pruner.sparsity:.4f}, and was to be {wanted:.4f}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what was saved so far, safe under `torch.load(weights_only=True)`."""
        if self._callback is None or not isinstance(self._callback.pruner, Pruner) or not self._pruner.guard:
            return self._loaded
        return {"best": self.best, "protected": list(self.protected), "guard": self._guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a checkpoint; it is put to use when training starts."""
        self._loaded = state_dict
        self.best, self.protected = state_dict.get("best"), list(state_dict.get("protected", []))

    @property
    def _pruner(self) -> Pruner:
        assert self._callback is not None and isinstance(self._callback.pruner, Pruner)
        return self._callback.pruner

    @property
    def _guard(self) -> Guard:
        assert self._pruner.guard is not None
        return self._pruner.guard
