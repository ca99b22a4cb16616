"""Scopes that differ in who is compared with whom: within a row, a layer, the whole network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from lightning_prune import core
from lightning_prune.core.allocation import (
    check_floors,
    check_has_rows,
    check_min_keep,
    floor_of,
    keep_each,
    keep_guarded,
    num_kept,
)
from lightning_prune.core.types import GroupScores, LazyScores, shapes_of, some_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.core.types import Masks, Name, Scores, Shape


@dataclass(frozen=True)
class Local:
    """Each parameter by itself, all to the same sparsity (uniform, layer-wise).

    Cost: no pass; a selection within one layer at a time.

    When: layers of like size, or where none may be thinner than another; above 95 % it starves the smallest layers,
        where `ERK` and `Global` are better.

    Args:
        min_keep: groups that each parameter keeps at least; a whole number, or a fraction of them below 1.

    Raises:
        ValueError: a negative `min_keep`, or (in use) a fraction that is more than the sparsity leaves.

    Example:
        >>> import torch
        >>> Local()({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([8.0, 9.0])}, 0.5)
        {'a': tensor([ True, False]), 'b': tensor([False,  True])}
    """

    by_rows: ClassVar[bool] = True
    min_keep: int | float = 1

    def __post_init__(self) -> None:
        check_min_keep(self.min_keep)

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        sizes = {name: math.prod(shape) for name, shape in shapes_of(scores).items()}
        counts = {
            n: max(num_kept(size, sparsity), floor_of(self.min_keep, size)) for n, size in sizes.items()
        }
        return keep_each(scores, counts)

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse a fraction to keep that contradicts the sparsity; a count gives way in layers that are small."""
        if isinstance(self.min_keep, float) and self.min_keep > 1.0 - sparsity + 1e-9:
            raise ValueError(
                f"`min_keep` is at most what the sparsity leaves of each parameter, {1.0 - sparsity:.4g}, but got "
                f"{self.min_keep!r}."
            )


@dataclass(frozen=True)
class Global:
    """All groups of all parameters in one ranking. Frankle & Carbin 2018 (arXiv:1803.03635), section 4.

    Cost: no pass; one selection over all weights, some 7 ns for each on a CPU, and some MB beside the masks.

    When: first; at the highest sparsities with `min_keep` or a `CollapseGuard`, since it may leave next to nothing of a
        layer.

    Args:
        min_keep: groups that each parameter keeps at least, so that no layer dies; a whole number, or a fraction
            of them below 1. The others give way: the number kept in all stays exact.

    Raises:
        ValueError: a negative `min_keep`, or (in use) one that needs more groups than the sparsity leaves.

    Example:
        >>> import torch
        >>> Global()({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([8.0, 9.0, 7.0, 6.0])}, 0.5)
        {'a': tensor([ True, False]), 'b': tensor([ True,  True, False, False])}
    """

    by_rows: ClassVar[bool] = True
    min_keep: int | float = 1

    def __post_init__(self) -> None:
        check_min_keep(self.min_keep)

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        return keep_guarded(scores, self._num_kept(scores, sparsity), self.min_keep)

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse a sparsity that leaves less than all floors together."""
        check_floors(shapes_of(scores), self._num_kept(scores, sparsity), self.min_keep)

    @staticmethod
    def _num_kept(scores: Scores, sparsity: float) -> int:
        return num_kept(sum(math.prod(shape) for shape in shapes_of(scores).values()), sparsity)


@dataclass(frozen=True)
class Isomorphic:
    """One ranking for each kind of group: only alike parts of a network are compared with each other.

    Fang et al. 2024 (arXiv:2407.04616), section 3.2: the scores of unlike parts (heads, embeddings, hidden layers of
    MLPs) have unlike distributions. Coupled groups (`Channel`, `Head`) are of one kind where they are built alike: they
    run through the same dims of the same types of modules, whatever those are called. Single tensors, of which the
    paper says nothing, are of one kind where their names differ in numbers only.

    Cost: as for `Global`.

    When: networks of unlike parts, transformers above all, most of all with `Channel`.

    Args:
        min_keep: as in `Global`.

    Raises:
        ValueError: a negative `min_keep`, or (in use) one that needs more groups than the sparsity leaves.

    Example:
        >>> import torch
        >>> scores = {"a.0": torch.tensor([3.0, 1.0]), "a.1": torch.tensor([8.0, 9.0]), "b": torch.tensor([0.1, 0.2])}
        >>> Isomorphic()(scores, 0.5)
        {'a.0': tensor([ True, False]), 'a.1': tensor([False,  True]), 'b': tensor([False,  True])}
    """

    by_rows: ClassVar[bool] = True
    min_keep: int | float = 1

    def __post_init__(self) -> None:
        check_min_keep(self.min_keep)

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        masks: Masks = {}
        for part in self._by_kind(scores):
            masks |= Global(self.min_keep)(part, sparsity)
        return {name: masks[name] for name in scores}

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse a sparsity that leaves less than all floors of a kind together."""
        for part in self._by_kind(scores):
            Global(self.min_keep).check(part, sparsity)

    @staticmethod
    def _by_kind(scores: Scores) -> list[LazyScores]:
        kinds = scores.kinds if isinstance(scores, GroupScores) else {name: kind_of(name) for name in scores}
        by_kind: dict[str, list[Name]] = {}
        for name in scores:
            by_kind.setdefault(kinds[name], []).append(name)
        return [some_of(scores, *names) for names in by_kind.values()]


def kind_of(name: Name) -> str:
    """Return what parameters of repeated layers have in common: their name without the layers' numbers.

    Example:
        >>> kind_of("blocks.3.mlp.weight")
        'blocks.*.mlp.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True)
class PerRow:
    """Each output's weights by themselves: every row (filter) of a parameter to the same sparsity.

    Sun et al. 2023 (arXiv:2306.11695), section 3, compare so. It needs scores of at least two dims.

    Cost: no pass; each row is sorted, some rows at a time.

    When: one shot with `Wanda` in language models, or where every output has to keep weights.

    Raises:
        ValueError: (in use) scores with fewer than two dims.

    Example:
        >>> import torch
        >>> PerRow()({"a": torch.tensor([[1.0, 2.0], [9.0, 8.0]])}, 0.5)
        {'a': tensor([[False,  True],
                [ True, False]])}
    """

    by_rows: ClassVar[bool] = True

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        self.check(scores, sparsity)
        return {name: self._mask(name, scores[name], sparsity) for name in scores}

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse scores that have no rows."""
        for name, shape in shapes_of(scores).items():
            check_has_rows("PerRow", name, shape)

    def _mask(self, name: Name, scores: Tensor, sparsity: float) -> Tensor:
        rows = self.rows(scores)
        num_keep = num_kept(rows.shape[1], sparsity)
        return self.from_rows(core.keep_top_rows(rows, num_keep, name), scores.shape)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return (outputs, all else)."""
        return tensor.flatten(1)

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return rows in the parameter's shape."""
        return rows.view(shape)


@dataclass(frozen=True)
class LAMP:
    """One ranking of scores made comparable across layers: s_u = w_u^2 / sum over |w_v| >= |w_u| of w_v^2.

    Lee et al. 2020, layer-adaptive magnitude pruning (arXiv:2010.07611), eq. 4; w is the score of the criterion,
    so the paper's method is `criterion=Magnitude()`. The best group of each parameter scores 1: no layer dies.

    Cost: no pass; at each reading of the scores those of a layer are sorted, in some float64 copies of that layer.

    When: high sparsities in training, where `Global` starves a layer, with `Magnitude`; not for scores that may be
        negative.

    Args:
        min_keep: as in `Global`.

    Raises:
        ValueError: a negative `min_keep`, or (in use) scores that are negative, infinite or NaN.

    Example:
        >>> import torch
        >>> LAMP()({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([30.0, 10.0])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """

    unsigned: ClassVar[bool] = True
    min_keep: int | float = 1

    def __post_init__(self) -> None:
        check_min_keep(self.min_keep)

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        return Global(self.min_keep)(
            LazyScores(shapes_of(scores), partial(self._normalised, scores)), sparsity
        )

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse a sparsity that leaves less than all floors together."""
        Global(self.min_keep).check(scores, sparsity)

    @staticmethod
    def _normalised(scores: Scores, name: Name) -> Tensor:
        raw = scores[name]
        flat = raw.flatten().double()
        gone = flat == -math.inf  # pruned before: below everything, and no part of any sum
        if bool(((flat < 0) & ~gone).any()):
            raise ValueError(
                f"`scope` LAMP squares the scores, which are at least 0, but got negative ones for `{name}`."
            )
        if not bool(flat.masked_fill(gone, 0.0).sum().isfinite()):
            raise ValueError(
                f"`scope` LAMP sums the scores up, which are finite, but got infinity or NaN among those of `{name}`."
            )
        squares, order = flat.masked_fill(gone, 0.0).square().sort(descending=True, stable=True)
        larger = running_sums(squares)  # the weight itself included
        normalised = squares.new_empty(flat.shape)
        normalised[order] = (squares / larger).nan_to_num(0.0)  # 0 / 0 where a whole layer is zero
        return normalised.masked_fill(gone, -math.inf).view(raw.shape)


def running_sums(values: Tensor) -> Tensor:
    """Return the sums of the first 1, 2, ... values, the same bits on every device and each time.

    A GPU adds floats up in an order of its own choice, another one each time, and what is ranked must not change from
    one reading to the next. So the values are added as integers: fractions of the largest, in units of 2^-62.

    Args:
        values: (n,), float64, finite, at least 0 and descending, n up to 2^30.

    Example:
        >>> import torch
        >>> running_sums(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64))
        tensor([4., 6., 7., 7.], dtype=torch.float64)
    """
    scaled = (values / values[:1]).nan_to_num(0.0) * 2**30  # 0 / 0 where all are zero
    units = scaled.floor()
    rest = ((scaled - units) * 2**32).long().cumsum(0)
    return (units.long().cumsum(0).double() + rest.double() * 2**-32) * 2**-30 * values[:1]
