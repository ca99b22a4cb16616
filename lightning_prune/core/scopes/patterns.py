"""Scopes that decide where the kept groups lie, in a pattern which hardware can use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_prune import core
from lightning_prune.core.checks import check_choice, check_count
from lightning_prune.core.types import LazyScores, across_of, shapes_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.core.types import Masks, Name, Scores, Shape


@dataclass(frozen=True)
class NofM:
    """N:M sparsity: of every `m` neighbours along the input dim, `n` are kept. Mishra et al. 2021 (arXiv:2104.08378).

    It prescribes the final sparsity, 1 - n/m, so the user gives none. On the way there the weights that are not
    among the best n of their block go first, worst first, and each parameter has exactly the sparsity asked for.

    Cost: no pass; each block of `m` is sorted, some blocks at a time, and on the way to n/m all of a layer's weights
        too.

    When: GPUs with sparse tensor cores, which `to_semi_structured` makes use of; elsewhere it brings no speed.

    Args:
        n: kept, at least 1.
        m: block length, above `n`; 2:4 is what GPUs speed up. Blocks lie along dim 1, for convolutions as well.
        indivisible: what becomes of a parameter whose input dim is no multiple of `m`: "refuse" it, or leave it
            "dense".

    Raises:
        ValueError: n and m do not fit, or (in use) a parameter cannot be divided into blocks.

    Example:
        >>> import torch
        >>> NofM(n=2, m=4)({"a": torch.tensor([[1.0, 4.0, 3.0, 2.0]])}, 0.5)
        {'a': tensor([[False,  True,  True, False]])}
    """

    by_rows: ClassVar[bool] = True
    n: int = 2
    m: int = 4
    indivisible: str = "refuse"

    def __post_init__(self) -> None:
        check_count("n", self.n, minimum=1)
        check_count("m", self.m, minimum=2)
        check_choice("indivisible", self.indivisible, ("refuse", "dense"))
        if self.n >= self.m:
            raise ValueError(f"`n` of every `m` are kept, n below m, but got n={self.n} and m={self.m}.")

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        masks: Masks = {}
        whole = self.prescribed(shapes := shapes_of(scores))
        reached = min(1.0, sparsity / whole) if whole else 0.0
        for name, shape in shapes.items():
            num_blocks = math.prod(shape) // self.m if self._divides(name, shape) else 0
            num_spared = num_blocks * (self.m - self.n) - round(reached * num_blocks * (self.m - self.n))
            masks[name] = self._mask(name, scores, num_blocks, num_spared)
        return masks

    def prescribed(self, shapes: Mapping[Name, Shape]) -> float:
        """Return 1 - n/m, times the share of the weights that can be divided."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        divided = sum(sizes[name] for name, shape in shapes.items() if self._divides(name, shape))
        return (1.0 - self.n / self.m) * divided / sum(sizes.values())

    def _divides(self, name: Name, shape: Shape) -> bool:
        fits = len(shape) >= 2 and shape[1] % self.m == 0
        if not fits and self.indivisible == "refuse":
            raise ValueError(
                f"`{name}`: {self.n}:{self.m} needs an input dim (dim 1) that is a multiple of {self.m}, but got shape "
                f"{shape}. Exclude it, or set indivisible='dense'."
            )
        return fits

    def _mask(self, name: Name, scores: Scores, num_blocks: int, num_spared: int) -> Tensor:
        found = scores[name]
        if not num_blocks:
            return found.new_ones(found.shape).bool()
        blocks = self.rows(found)
        best = core.keep_top_rows(blocks, self.n, name)
        if num_spared > 0:
            others = blocks.masked_fill(best, math.inf)  # the best of each block come first in this ranking
            ranked = LazyScores({name: (num_blocks, self.m)}, lambda _: others, across_of(scores))
            best = core.keep_top(ranked, num_blocks * self.n + num_spared)[name]
        return self.from_rows(best, found.shape)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return (blocks, m), or a single row of what cannot be divided."""
        is_divided = tensor.dim() >= 2 and tensor.shape[1] % self.m == 0
        return (
            tensor.movedim(1, -1).reshape(tensor.numel() // self.m, self.m)
            if is_divided
            else tensor.reshape(1, -1)
        )

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return blocks in the parameter's shape."""
        if len(rows) == 1:
            return rows.view(shape)
        return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
