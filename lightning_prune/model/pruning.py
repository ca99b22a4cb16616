"""A model and a recipe: masks are computed, kept and applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.granularities import Weight
from lightning_prune.core.masks import (
    PackedMask,
    check_mask,
    compute_masks,
    pack,
    unpack,
)
from lightning_prune.core.patterns import listed
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.scoring import group_scores, group_shapes, without_pruned
from lightning_prune.core.types import (
    BY_ROWS,
    Checks,
    Couples,
    LazyScores,
    Masks,
    Name,
    Shape,
    some_of,
    unread,
)
from lightning_prune.graph import Plan
from lightning_prune.model.apply import Masked
from lightning_prune.model.guarding import Guard
from lightning_prune.model.orientation import Oriented, turned_in
from lightning_prune.model.shards import shards_of
from lightning_prune.model.statistics import Statistics
from lightning_prune.model.surgery import sliced
from lightning_prune.model.targets import check_values, select_targets


class Pruner(Masked):
    """The masks of one model under one recipe.

    Args:
        model: it is only read here; `update_` and `apply_` change its weights in place.
        recipe: what is pruned, and how much of it in the end.
        trained: ids of the parameters that are being trained; where the recipe names no targets of its own, others
            (a frozen teacher, an average of the weights) are left alone. All count by default.

    Raises:
        ValueError: the recipe does not fit the model (patterns without a match, layers that N:M cannot divide,
            statistics that cannot be read, ...).
    """

    can_compact: ClassVar[bool] = True
    """Whether nothing of what is pruned needs to be remembered."""

    def __init__(self, model: nn.Module, recipe: Recipe, trained: Container[int] | None = None) -> None:
        if isinstance(recipe.granularity, Couples):
            raise ValueError(
                f"`granularity` is one of single tensors here, such as Weight(), but got {recipe.granularity}: what is "
                "coupled across layers is taken out by `shrink(model, example, ...)`."
            )
        self.model, self.recipe, self.granularity = model, recipe, recipe.granularity
        self.targets = select_targets(model, include=recipe.include, exclude=recipe.exclude, trained=trained)
        check_values(self.targets)
        turned = turned_in(model, self.targets) if self.granularity == Weight() else frozenset()
        self.scope = Oriented(recipe.scope, turned)
        shapes = self._read_shapes()
        if isinstance(recipe.scope, Checks):
            recipe.scope.check(unread(shapes), self.final_sparsity)
        self.statistics = Statistics(model, self.targets, required_statistics(recipe.criterion))
        nouns = (recipe.criterion, recipe.granularity, recipe.scope)
        by_rows = not turned and all(getattr(noun, BY_ROWS, False) for noun in nouns)
        self.shards = shards_of(self.targets, by_rows=by_rows)
        self.masks: Masks = {}
        """Of the weights, or of those parts of them that lie on this process."""
        self.requested = 0.0
        self.guard: Guard | None = None

    @property
    def num_groups(self) -> int:
        """The number of groups of all targets."""
        return sum(math.prod(shape) for shape in self.group_shapes.values())

    @property
    def sparsity(self) -> float:
        """The fraction of the targets' weights that the masks remove."""
        total = sum(math.prod(self.shapes[name]) for name in self.masks)
        return 1.0 - sum(self.shards.num_kept(self.masks).values()) / total if total else 0.0

    @property
    def sparsities(self) -> dict[Name, float]:
        """The fraction of each target's weights that its mask removes."""
        kept = self.shards.num_kept(self.masks)
        return {name: 1.0 - number / math.prod(self.shapes[name]) for name, number in kept.items()}

    @property
    def group_sparsity(self) -> float:
        """The fraction of the groups that the masks remove; to be called on all processes."""
        counts = self.counts().values()
        return 1.0 - sum(kept for _, kept in counts) / sum(size for size, _ in counts) if counts else 0.0

    def counts(self) -> dict[Name, tuple[int, int]]:
        """Return how many groups each masked target has and keeps, or weights where each is its own group."""
        kept = self.shards.num_kept(self.masks)
        return {n: self.count_groups(n) or (math.prod(self.shapes[n]), kept[n]) for n in self.masks}

    def count_groups(self, name: Name) -> tuple[int, int] | None:
        """Return how many groups a target has and keeps; None where each weight is its own group."""
        if self.group_shapes[name] == self.shapes[name]:
            return None
        size = math.prod(self.group_shapes[name])
        if name not in self.masks:
            return size, size
        mask = self.shards.whole(name, self.masks[name])
        return size, int((self.granularity.reduce(mask.float()) > 0).sum())

    def update_(self, fraction: float) -> None:
        """Compute new masks, for a fraction of the final sparsity in [0, 1], and apply them.

        What is pruned stays pruned, unless less sparsity than before is asked for: then all weights compete anew.
        """
        self.choose_(fraction)
        self.apply_()

    def choose_(self, fraction: float) -> None:
        """Compute new masks as `update_` does; no weight is changed yet."""
        requested, scores, before = fraction * self.final_sparsity, self.scores(), self.masks
        if requested >= self.requested:
            scores = without_pruned(scores, self.shards.seen(before), self.granularity)
        masks = self._guarded(scores, requested)
        if self.guard is not None:
            self.guard.note(before, masks, self.targets)
        self.masks, self.requested = masks, requested
        self.statistics.clear()

    def _guarded(self, scores: LazyScores, sparsity: float) -> Masks:
        """Let all compete; with a guard, anew for each layer that would be left too little of."""
        masks = self._chosen(scores, sparsity)
        while self.guard is not None and (dying := self.guard.dying(masks)):
            self.guard.protect(dying, self.masks, self.targets)
            masks = self._chosen(scores, sparsity)
        return masks

    def _chosen(self, scores: LazyScores, sparsity: float) -> Masks:
        """Let all compete, or with a guard those that it does not protect, which make up for the others."""
        held = dict(self.guard.held) if self.guard is not None else {}
        shapes = {name: shape for name, shape in scores.shapes.items() if name not in held}
        if not (sparsity and shapes):
            return held
        if self.guard is not None and held:
            kept = sum(int((self.granularity.reduce(m.float()) > 0).sum()) for m in held.values())
            sizes = {name: math.prod(shape) for name, shape in self.group_shapes.items()}
            sparsity = self.guard.share(sizes, kept, sparsity)
        rest = some_of(scores, *shapes)
        granularity, scope = self.granularity, self.scope
        chosen = compute_masks(rest, self.shards.shapes, sparsity, granularity=granularity, scope=scope)
        masks = self.shards.own(chosen)
        return {name: masks[name] if name in masks else held[name] for name in scores}

    def roll_back_(self) -> Name:
        """Undo all updates since the guard's mark, and protect the layer that they had left least of what it had.

        Returns:
            The name of that layer.
        """
        assert self.guard is not None
        after, before = self.masks, self.guard.undo_(self.targets)
        name = self.guard.suspect(before, after)
        self.masks, self.requested = before, self.guard.requested
        self.guard.protect([name], before, self.targets)
        self.apply_()
        return name

    def scores(self) -> LazyScores:
        """Return the scores of all groups by what the statistics know now."""
        shards, criterion = self.shards, self.recipe.criterion
        stats = shards.stats(self.statistics.read())
        found = group_scores(stats, shards.shapes, criterion=criterion, granularity=self.granularity)
        return LazyScores(self.group_shapes, found.__getitem__, shards.across, found.pieces)

    def forget(self) -> None:
        """Let all weights compete anew at the next update, those that are pruned by now among them."""
        self.masks = {}

    def _read_shapes(self) -> dict[Name, Shape]:
        """Read the shapes of the targets, and what follows from them; return those that the scope sees."""
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.targets.items()}
        self.group_shapes = group_shapes(self.shapes, self.granularity)
        shapes = self.scope.shapes(self.group_shapes)
        self.final_sparsity = self.recipe.final_sparsity(shapes)
        return shapes

    def follow_(self, plan: Plan) -> None:
        """Go on with the smaller model once someone else has carried out a plan; masks and sums are cut alike."""
        if plan.slices.keys() & self.targets.keys():
            self._read_shapes()
            self.masks = {n: sliced(mask, plan.slices.get(n, {})) for n, mask in self.masks.items()}
            self.statistics.cut_(self.model, plan.slices)

    def state_dict(self) -> dict[str, Any]:
        """Return masks (packed), progress and sums, all of it safe under `torch.load(weights_only=True)`."""
        packed = {name: pack(self.shards.whole(name, mask)) for name, mask in self.masks.items()}
        statistics = {
            key: self._moved(key, s, self.shards.whole) for key, s in self.statistics.state_dict().items()
        }
        return {"masks": packed, "requested": self.requested, "statistics": statistics}

    def _moved(self, key: str, value: Tensor, move: Callable[[Name, Tensor], Tensor]) -> Tensor:
        """Put together a total of gradients, "kind.total.name", or take the part of it that lies here."""
        _, what, name = (*key.split(".", 2), "", "")[:3]
        return move(name, value) if what == "total" and name in self.targets else value

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or leave all as it is.

        Raises:
            ValueError: the masks belong to other parameters or shapes.
        """
        packed: Mapping[str, PackedMask] = state["masks"]
        if unknown := [name for name in packed if name not in self.targets]:
            raise ValueError(
                f"`masks` of the checkpoint belong to the pruned weights, {listed(self.targets)}, but got some for "
                f"{listed(unknown)}: the model, `include` or `exclude` has changed."
            )
        masks = {name: unpack(name, mask) for name, mask in packed.items()}
        for name, mask in masks.items():
            check_mask(name, mask, self.shapes[name])
        statistics = {key: self._moved(key, s, self.shards.part) for key, s in state["statistics"].items()}
        placed = {name: mask.to(self.targets[name].device) for name, mask in masks.items()}
        self.masks = {name: self.shards.part(name, mask) for name, mask in placed.items()}
        self.requested = float(state["requested"])
        self.statistics.load_state_dict(statistics)
