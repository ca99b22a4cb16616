"""Scopes that let layers with outliers stay denser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_prune import core
from lightning_prune.core.allocation import apportion, check_has_rows, keep_each, num_kept
from lightning_prune.core.checks import check_flag, check_positive, check_range
from lightning_prune.core.types import shapes_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lightning_prune.core.types import Masks, Name, Scores, Shape


@dataclass(frozen=True)
class OWL:
    """Layers whose scores have more outliers are pruned less: density_l = density + width (2 d_l - mean of 2 d).

    Yin et al. 2023, outlier weighed layer-wise sparsity (arXiv:2310.05175), section 3.2. D_l is the fraction of layer
    l's scores above `threshold` times their mean, and d_l = (D_l - min D) / (max D - min D); the paper's scores are
    `criterion=Wanda()`. A layer is a block of the network: the parameters whose names agree up to the first number.
    The mean is weighted by size, so that the number kept in all is exact; each parameter keeps its own best, of all its
    scores or, as the paper does, within each row.

    Cost: as for `Local`, and one more reading of all scores.

    When: one shot in large language models above 50 %, with `Wanda` (recipe `owl`); on our small networks it was not
        ahead of `PerRow`.

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
        density = total / sum(sizes.values())
        ratios = self._ratios(scores, sizes)
        low, high = min(ratios.values()), max(ratios.values())
        raised = {name: 2 * self.width * (r - low) / (high - low or 1.0) for name, r in ratios.items()}
        mean = sum(raised[name] * size for name, size in sizes.items()) / sum(sizes.values())
        room = min(1.0, *(_room(density, r - mean) for r in raised.values()))
        return {name: size * (density + room * (raised[name] - mean)) for name, size in sizes.items()}

    def _ratios(self, scores: Scores, sizes: Mapping[Name, int]) -> dict[Name, float]:
        """Return the outlier ratio of each parameter's layer; what is pruned by now counts as 0."""
        layers: dict[str, list[Name]] = {}
        for name in sizes:
            layers.setdefault(layer_of(name), []).append(name)
        ratios = {}
        for layer, names in layers.items():
            num_scores = sum(sizes[name] for name in names)
            mean = sum(_total(scores[name], name) for name in names) / num_scores
            outliers = sum(int((scores[name] > self.threshold * mean).sum()) for name in names)
            ratios[layer] = outliers / num_scores
        return {name: ratios[layer_of(name)] for name in sizes}


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


def layer_of(name: Name) -> str:
    """Return the block of a repeated structure that a parameter belongs to, or the parameter itself.

    Example:
        >>> layer_of("model.layers.3.mlp.up.weight"), layer_of("head.weight")
        ('model.layers.3', 'head.weight')
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _room(density: float, change: float) -> float:
    """Return by what factor a change of the density takes it half-way to 0 or to 1; as good as infinite for none."""
    return 0.5 * (density if change < 0 else 1.0 - density) / max(abs(change), 1e-30)
