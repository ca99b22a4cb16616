"""Scopes that decide first how many groups each parameter keeps; each then keeps its own best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_prune import core
from lightning_prune.core.allocation import apportion, check_has_rows, keep_each, num_kept
from lightning_prune.core.checks import check_sparsity
from lightning_prune.core.patterns import check_match, check_patterns, matches
from lightning_prune.core.types import shapes_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.core.types import Masks, Name, Scores, Shape


@dataclass(frozen=True)
class ERK:
    """Erdős–Rényi: small and narrow layers stay denser. density_l = eps (sum of l's dims) / (product of l's dims).

    Mocanu et al. 2018 (arXiv:1707.04780), eq. 2 for linear layers; Evci et al. 2020 (arXiv:1911.11134), section 3,
    with the kernel dims. eps follows from the overall sparsity; layers that would pass density 1 are dense, and the
    others share what is left. The number kept in all is exact.

    Cost: as for `Local`.

    When: sparse training, and high sparsities in training, where small layers should not be the first to be emptied.

    Args:
        kernel: whether kernel dims count (ERK); without them it is ER, of in and out alone.

    Example:
        >>> import torch
        >>> masks = ERK()({"wide": torch.rand(100, 100), "narrow": torch.rand(10, 100)}, 0.5)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'wide': 4500, 'narrow': 1000}
    """

    by_rows: ClassVar[bool] = True
    kernel: bool = True

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        sizes = {name: math.prod(shape) for name, shape in shapes_of(scores).items()}
        total = num_kept(sum(sizes.values()), sparsity)
        counts = apportion(self.shares(shapes_of(scores), sparsity), sizes, total)
        return keep_each(scores, {name: counts[name] for name in scores})

    def shares(self, shapes: Mapping[Name, Shape], sparsity: float) -> dict[Name, float]:
        """Return how much each parameter keeps, a real number: by raw densities, those that would pass 1 first."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        total = num_kept(sum(sizes.values()), sparsity)
        raw = {name: self._raw_density(shape) * sizes[name] for name, shape in shapes.items()}
        dense = set[str]()
        while True:
            left = total - sum(sizes[name] for name in dense)
            eps = left / max(sum(raw[name] for name in raw if name not in dense), 1e-30)
            over = {name for name in raw if name not in dense and eps * raw[name] > sizes[name]}
            if not over:
                return {name: sizes[name] if name in dense else eps * raw[name] for name in raw}
            dense |= over

    def _raw_density(self, shape: Shape) -> float:
        dims = shape if self.kernel else shape[:2]
        return sum(dims) / math.prod(dims)


@dataclass(frozen=True)
class ConstantFanIn:
    """Every output of a layer keeps equally many weights; layers share out how many in all by `ERK`.

    Lasby et al. 2023, SRigL (arXiv:2305.02299), section 3: k_l = density_l n_l, to the nearest whole number and at
    least one, where n_l is how many weights an output of layer l has. No output is ever without one; the paper lets
    some die out (its ablation), which is left out here. It needs scores of at least two dims.

    Cost: as for `PerRow`.

    When: sparse training for a kernel that wants equally many weights in each row (recipe `srigl`).

    Args:
        kernel: as in `ERK`.

    Raises:
        ValueError: (in use) scores with fewer than two dims.

    Example:
        >>> import torch
        >>> masks = ConstantFanIn()({"wide": torch.rand(100, 100), "narrow": torch.rand(10, 100)}, 0.9)
        >>> {name: mask.sum(1).unique().tolist() for name, mask in masks.items()}
        {'wide': [7], 'narrow': [39]}
    """

    by_rows: ClassVar[bool] = True
    kernel: bool = True

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        self.check(scores, sparsity)
        counts = self._per_row(shapes_of(scores), sparsity)
        return {name: self._mask(name, scores[name], counts[name]) for name in scores}

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse scores that have no rows."""
        for name, shape in shapes_of(scores).items():
            check_has_rows("ConstantFanIn", name, shape)

    def _per_row(self, shapes: Mapping[Name, Shape], sparsity: float) -> dict[Name, int]:
        shares = ERK(self.kernel).shares(shapes, sparsity)
        return {name: max(1, round(shares[name] / shape[0])) for name, shape in shapes.items()}

    def _mask(self, name: Name, scores: Tensor, num_keep: int) -> Tensor:
        return self.from_rows(core.keep_top_rows(self.rows(scores), num_keep, name), tuple(scores.shape))

    def rows(self, tensor: Tensor) -> Tensor:
        """Return (outputs, all else)."""
        return tensor.flatten(1)

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return rows in the parameter's shape."""
        return rows.view(shape)


@dataclass(frozen=True)
class Fixed:
    """Numbers by name: each parameter to the sparsity of the first pattern that matches it, the others stay dense.

    Cost: as for `Local`.

    When: how sparse each layer should be is known, as from `sensitivity` and `allocate`.

    Args:
        sparsities: pattern (`core.patterns`) -> final sparsity in [0, 1), in the order in which they are tried.

    Raises:
        ValueError: no pattern, a bad one, a number that is no sparsity, or (in use) a pattern that matches nothing.

    Example:
        >>> import torch
        >>> fixed = Fixed({"head": 0.0, "*": 0.5})
        >>> fixed.prescribed({"head.weight": (2, 2), "body.weight": (2, 6)})
        0.375
    """

    by_rows: ClassVar[bool] = True
    sparsities: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.sparsities, Mapping):
            raise ValueError(f"`sparsities` maps patterns to sparsities, but got {self.sparsities!r}.")
        if not self.sparsities:
            raise ValueError("`sparsities` maps at least one pattern to a sparsity, but got none.")
        check_patterns("sparsities", self.sparsities)
        for pattern, sparsity in self.sparsities.items():
            check_sparsity(f"sparsities[{pattern!r}]", sparsity)
        object.__setattr__(self, "sparsities", dict(self.sparsities))

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        shapes = shapes_of(scores)
        whole = self.prescribed(shapes)
        reached = min(1.0, sparsity / whole) if whole else 0.0
        final = self._by_name(shapes)
        counts = {name: num_kept(math.prod(shape), reached * final[name]) for name, shape in shapes.items()}
        return keep_each(scores, counts)

    def prescribed(self, shapes: Mapping[Name, Shape]) -> float:
        """Return the mean of the sparsities, weighted by size."""
        final = self._by_name(shapes)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        return sum(sizes[name] * final[name] for name in sizes) / sum(sizes.values())

    def _by_name(self, names: Mapping[Name, object]) -> dict[Name, float]:
        for pattern in self.sparsities:
            check_match("sparsities", pattern, names)
        return {n: next((float(s) for p, s in self.sparsities.items() if matches(p, n)), 0.0) for n in names}
