"""Training that is sparse from start to end, in places that change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from lightning_prune.callbacks.in_training import InTraining
from lightning_prune.core.criteria.gradients import GradientMagnitude
from lightning_prune.core.criteria.weights import Magnitude, Random
from lightning_prune.core.regrowth import SparseRecipe
from lightning_prune.core.schedules import Constant, Cosine
from lightning_prune.core.scopes.allocations import ERK
from lightning_prune.core.types import Criterion, Schedule, Scope
from lightning_prune.core.windows import Window
from lightning_prune.model.optimizer import trained_ids
from lightning_prune.model.regrowing import RegrowingPruner


class SparseTraining(InTraining):
    """Train a network that is sparse from the first step on; at each update weights are dropped and others are grown.

    By default RigL, Evci et al. 2020 (arXiv:1911.11134): of the active weights of each layer the smallest are dropped,
    and as many are grown where the gradient of the loss is largest, at zero. The fraction that moves falls along a
    cosine to none. `grow=Random()` is SET (Mocanu et al. 2018, arXiv:1707.04780); with `schedule=Polynomial()` the
    network starts dense and is pruned on the way, as in GraNet (Liu et al. 2021, arXiv:2106.10404); `drop_fraction=0`
    is static sparse training. The number of active weights is exact at every step. A grown weight starts at zero, and
    so does what the optimizer remembers of it.

    Gradients of inactive weights are looked at in the step of an update only. Parameters keep their names and class,
    checkpoints hold plain weights, and a resumed run goes on bit for bit.

    Cost: nothing but masks between updates; at one, the selection of two sets of weights for each layer.

    When: to train at a sparsity that the network never exceeds in density, for longer than dense training would take.

    Args:
        sparsity: fraction of the weights that are zero in the end, in [0, 1); numbers by name pattern; None where the
            scope prescribes it.
        schedule: progress through the window -> fraction of `sparsity`; by default all of it from the start.
        criterion: how good each active weight is; the worst are dropped.
        grow: how good each free place is; the best are grown.
        initial: which weights the training starts with.
        scope: how many weights each layer has (`ERK`, `Local`), or each row (`PerRow`), or block (`NofM`).
        drop_fraction: of the active weights, at the first update, in [0, 1].
        decay: progress through the window -> how much of `drop_fraction` is gone, both in [0, 1]; None keeps it.
        window: when weights are dropped and grown; the masks rest after its end.
        include: patterns or module types; by default the linear, convolution and attention weights that are trained.
        exclude: patterns or module types to leave dense.
        report: whether to write `report.json` and `report.md` beside the run.
        compact: whether optimizers step the surviving weights alone where that is faster (very sparse, on CPU): same
            result, cheaper steps, less memory; `optimizer.state` holds vectors of the survivors meanwhile.

    Raises:
        ValueError: a value out of its range, at once; what does not fit model or trainer, before the first step.

    Example:
        >>> from lightning_prune import Random, SparseTraining
        >>> SparseTraining(sparsity=0.9, grow=Random(seed=1)).describe()["grow"]
        'Random(seed=1)'
    """

    kind = "sparse_training"
    can_shard = True

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        schedule: Schedule = Constant(),
        criterion: Criterion = Magnitude(),
        grow: Criterion = GradientMagnitude(),
        initial: Criterion = Random(),
        scope: Scope = ERK(),
        drop_fraction: float = 0.3,
        decay: Schedule | None = Cosine(),
        window: Window = Window(end=0.75, every=0.02),
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] = (),
        report: bool = True,
        compact: bool = True,
    ) -> None:
        self.sparse = SparseRecipe(
            sparsity, criterion, grow, initial, scope, drop_fraction, decay, include, exclude
        )
        super().__init__(self.sparse.plain, schedule=schedule, window=window, report=report, compact=compact)

    @property
    def is_final(self) -> bool:
        """Whether as many weights are gone as are to go; places may still change."""
        return self.pruner is not None and self.pruner.requested >= self._pruner.final_sparsity

    @property
    def unguarded(self) -> str | None:
        """Why there is nothing to undo: layers have as many weights at the end as at the start."""
        if self.schedule == Constant():
            return "whose layers never lose a weight without another one growing there, the schedule being constant"
        return super().unguarded

    def describe(self) -> dict[str, str]:
        """Return the nouns as text."""
        return super().describe() | self.sparse.describe()

    def _new_pruner(self, trainer: L.Trainer, pl_module: L.LightningModule) -> RegrowingPruner:
        return RegrowingPruner(pl_module, self.sparse, trained_ids(trainer.optimizers))

    def _begin(self) -> None:
        """Choose where training starts, before the first step."""
        if self._regrowing.num_updates == 0:
            self._update_(self._ramp.fraction, step=self._ramp.num_steps, progress=self._ramp.progress)
            self._ramp.is_due = False

    def _before_update(self) -> None:
        self._regrowing.progress = self._ramp.progress

    @property
    def _regrowing(self) -> RegrowingPruner:
        assert isinstance(self.pruner, RegrowingPruner)
        return self.pruner
