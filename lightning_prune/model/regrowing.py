"""A model and a sparse recipe: weights are dropped and grown, and their number stays what the recipe says."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.regrowth import SparseRecipe, regrow
from lightning_prune.core.scoring import group_scores, without_pruned
from lightning_prune.core.types import Criterion, Divides, LazyScores, Shape
from lightning_prune.graph import Plan
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shards import local, shards_of
from lightning_prune.model.statistics import Statistics


class RegrowingPruner(Pruner):
    """The masks of one model under one sparse recipe.

    Args:
        model: as for `Pruner`.
        sparse: how much is zero, and how places change.
        trained: as for `Pruner`.

    Raises:
        ValueError: the recipe does not fit the model.
    """

    def __init__(self, model: nn.Module, sparse: SparseRecipe, trained: Container[int] | None = None) -> None:
        super().__init__(model, sparse.plain, trained)
        self.sparse = sparse
        needed = (*required_statistics(sparse.criterion), *required_statistics(sparse.grow))
        self.statistics = Statistics(model, self.targets, tuple(dict.fromkeys(needed)))
        self.shards = shards_of(self.targets, by_rows=False)  # a layer's weights compete as one
        self.num_updates = 0
        self.progress = 0.0
        """How much of the window lies behind at the next update, in [0, 1]."""

    def update_(self, fraction: float) -> None:
        """Drop and grow, once what the schedule asks for is gone; the first call chooses where training starts.

        Args:
            fraction: of the final sparsity, in [0, 1].
        """
        requested, before = fraction * self.final_sparsity, dict(self.masks)
        if self.num_updates == 0:
            self.masks = self._guarded(self._initial_scores(), requested)
        else:
            if requested > self.requested:
                seen = self.shards.seen(before)
                scores = without_pruned(self._scores(self.sparse.criterion), seen, self.granularity)
                self.masks = self._guarded(scores, requested)
            self._regrow_(self.sparse.dropped(self.progress))
        if self.guard is not None:
            self.guard.follow(self.masks)
            self.guard.note(before, self.masks, self.targets)
        self.requested = max(requested, self.requested)
        self.num_updates += 1
        self.statistics.clear()
        self.apply_()

    def _initial_scores(self) -> LazyScores:
        known = {name: {"weight": local(p.detach()), "name": name} for name, p in self.targets.items()}
        wanted = required_statistics(self.sparse.initial)
        stats = self.shards.stats({n: {kind: found[kind] for kind in wanted} for n, found in known.items()})
        return group_scores(stats, self.shapes, criterion=self.sparse.initial, granularity=self.granularity)

    def _scores(self, criterion: Criterion) -> LazyScores:
        """Return the scores of a criterion; one that goes by name sees a new name at each update."""
        wanted = required_statistics(criterion)
        stats = {
            name: {k: s for k, s in found.items() if k in wanted}
            for name, found in self.statistics.read().items()
        }
        if "name" in wanted:
            stats = {name: found | {"name": f"{name}/{self.num_updates}"} for name, found in stats.items()}
        seen = self.shards.stats(stats)
        return group_scores(seen, self.shapes, criterion=criterion, granularity=self.granularity)

    @torch.no_grad()
    def _regrow_(self, fraction: float) -> None:
        drop, grow = self._scores(self.sparse.criterion), self._scores(self.sparse.grow)
        for name, mask in self.shards.seen(self.masks).items():
            seen = [self.scope.turn(name, tensor) for tensor in (mask, drop[name], grow[name])]
            rows = [self._rows(tensor) for tensor in seen]
            found = self._from_rows(regrow(rows[0], rows[1], rows[2], fraction, name), tuple(seen[0].shape))
            self.masks[name] = self.shards.part(name, self.scope.turn(name, found).contiguous())

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return a parameter as the rows that the scope divides it into, a single one where it does not."""
        scope = self.recipe.scope
        return scope.rows(tensor) if isinstance(scope, Divides) else tensor.reshape(1, -1)

    def _from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        scope = self.recipe.scope
        return scope.from_rows(rows, shape) if isinstance(scope, Divides) else rows.view(shape)

    def follow_(self, plan: Plan) -> None:
        """Go on with the smaller model."""
        super().follow_(plan)
        self.lasting = self.masks

    def state_dict(self) -> dict[str, Any]:
        """Return masks, progress, sums and the number of updates, safe under `torch.load(weights_only=True)`."""
        return super().state_dict() | {"num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or leave all as it is."""
        super().load_state_dict(state)
        self.num_updates = int(state["num_updates"])
