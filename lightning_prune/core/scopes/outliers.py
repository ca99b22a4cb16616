"""Scopes that let layers with outliers stay denser."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_prune import core
from lightning_prune.core.allocation import apportion, check_has_rows, keep_each, num_kept
from lightning_prune.core.checks import check_flag, check_positive, check_range
from lightning_prune.core.types import shapes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from lightning_prune.core.types import Masks, Name, Scores, Shape


@dataclass(frozen=True)
class OWL:
    """Layers whose scores have more outliers are pruned less: density_l = density + width (2 d_l - mean of 2 d).

    Yin et al. 2023, outlier weighed layer-wise sparsity (arXiv:2310.05175), section 3.2. D_l is the fraction of layer
    l's scores above `threshold` times their mean, and d_l = (D_l - min D) / (max D - min D); the paper's scores are
    `criterion=Wanda()`. A layer is a block of the network, of which others have equally many parameters of the same
    names, as `blocks.0` and `blocks.1`. What belongs to none, such as a head, has the density of the whole; where there
    are no blocks, each parameter is a layer. The mean is weighted by size, so that the number kept in all is exact;
    each parameter keeps its own best, of all its scores or, as the paper does, within each row.

    Cost: as for `Local`, and one more reading of all scores.

    When: one shot in large language models above 50 %, with `Wanda` (recipe `owl`); of our small ones it was ahead of
        `PerRow` on WikiText-2, and behind where blocks have nearly equally many outliers.

    Args:
        threshold: what an outlier is, in means of the layer's scores, above 0; the paper's are 3 to 10.
        width: how far densities may be from each other, half of the whole range, in (0, 0.5). All differences shrink
            by one factor where a layer would pass half-way from the overall density to 0 or to 1: none dies.
        per_row: whether each row of a parameter keeps equally many, as in `PerRow`; those that remain go to the rows
            whose next best scores are highest.

    Raises:
        ValueError: a value out of its range, or (in use) scores that are infinite or NaN.

    Example:
        >>> import torch
        >>> scores = {"h.0": torch.tensor([1.0] * 9 + [90.0]), "h.1": torch.arange(10.0)}
        >>> {name: int(mask.sum()) for name, mask in OWL(width=0.1)(scores, 0.5).items()}
        {'h.0': 6, 'h.1': 4}
    """

    unsigned: ClassVar[bool] = True
    threshold: float = 5.0
    width: float = 0.08
    per_row: bool = False

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        check_range("width", self.width, 0.0, 0.5, "a number in (0, 0.5)", open_start=True, open_end=True)
        check_flag("per_row", self.per_row)

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        shapes = shapes_of(scores)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        total = num_kept(sum(sizes.values()), sparsity)
        counts = apportion(self._shares(scores, shapes, total), sizes, total)
        if self.per_row:
            self.check(scores, sparsity)
            return {name: keep_in_rows(scores[name], counts[name], name) for name in scores}
        return keep_each(scores, {name: counts[name] for name in scores})

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse scores that have no rows, where those count."""
        for name, shape in shapes_of(scores).items() if self.per_row else ():
            check_has_rows("OWL(per_row=True)", name, shape)

    def _shares(self, scores: Scores, shapes: Mapping[Name, Shape], total: int) -> dict[Name, float]:
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        layers = layers_of(sizes)
        ratios = [self._ratio(scores, names, sizes) for names in layers]
        low, high = min(ratios), max(ratios)
        raised = {
            name: 2 * self.width * (ratio - low) / (high - low or 1.0)
            for names, ratio in zip(layers, ratios, strict=True)
            for name in names
        }
        mean = sum(raised[name] * sizes[name] for name in raised) / sum(sizes[name] for name in raised)
        density = total / sum(sizes.values())
        room = min(1.0, *(_room(density, r - mean) for r in raised.values()))
        return {
            name: size * (density + room * (raised.get(name, mean) - mean)) for name, size in sizes.items()
        }

    def _ratio(self, scores: Scores, names: Sequence[Name], sizes: Mapping[Name, int]) -> float:
        """Return the outlier ratio of a layer; what is pruned by now counts as 0."""
        num_scores = sum(sizes[name] for name in names)
        mean = sum(_total(scores[name], name) for name in names) / num_scores
        return sum(int((scores[name] > self.threshold * mean).sum()) for name in names) / num_scores


def _total(scores: Tensor, name: Name) -> float:
    total = float(scores.detach().masked_fill(scores == -math.inf, 0.0).double().sum())
    if not math.isfinite(total):
        raise ValueError(
            f"`scope` OWL compares with the mean score, which is finite, but got {total / scores.numel()} for `{name}`."
        )
    return total


def keep_in_rows(scores: Tensor, num_keep: int, name: Name) -> Tensor:
    """Return a mask of `num_keep` scores, of which all rows have equally many, or one more.

    Example:
        >>> import torch
        >>> keep_in_rows(torch.tensor([[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]), 3, "weight")
        tensor([[False, False,  True],
                [ True,  True, False]])
    """
    rows = scores.flatten(1)
    each, more = divmod(num_keep, len(rows))
    mask = core.keep_top_rows(rows, each, name)
    if more:
        best = core.keep_top_rows(rows, each + 1, name) & ~mask  # the next of each row
        mask |= best & core.keep_top({name: rows[best]}, more)[name].unsqueeze(1)
    return mask.view(scores.shape)


def layers_of(names: Iterable[Name]) -> list[list[Name]]:
    """Return the parameters of each block of a repeated structure, the outermost one; without any, each by itself.

    Example:
        >>> layers_of(["embed.weight", "h.0.q.weight", "h.0.up.0.weight", "h.1.q.weight", "h.1.up.0.weight"])
        [['h.0.q.weight', 'h.0.up.0.weight'], ['h.1.q.weight', 'h.1.up.0.weight']]
        >>> layers_of(["conv.weight", "head.weight"])
        [['conv.weight'], ['head.weight']]
    """
    found = list(names)
    blocks = _blocks(found, 0)
    return blocks or [[name] for name in found]


def _blocks(names: Sequence[Name], at: int) -> list[list[Name]]:
    """Return what is repeated among names that agree in their first `at` parts."""
    by_part: dict[str, list[Name]] = {}
    for name in names:
        parts = name.split(".")
        if len(parts) > at:
            by_part.setdefault(parts[at], []).append(name)
    ends = {
        part: tuple(name.split(".", at + 1)[-1] for name in inside)
        for part, inside in by_part.items()
        if part.isdigit()
    }
    counts = Counter(ends.values())
    blocks = []
    for part, inside in by_part.items():
        is_repeated = part in ends and counts[ends[part]] > 1
        blocks += [inside] if is_repeated else _blocks(inside, at + 1)
    return blocks


def _room(density: float, change: float) -> float:
    """Return by what factor a change of the density takes it half-way to 0 or to 1; as good as infinite for none."""
    return 0.5 * (density if change < 0 else 1.0 - density) / max(abs(change), 1e-30)
