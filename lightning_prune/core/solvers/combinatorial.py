"""Masks and values at once: the combinatorial problem of a layer, by operator splitting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.core.checks import check_count, check_positive
from lightning_prune.core.solvers import best_values, damped

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.core.quotas import Quota

PERIOD = 3  # steps between two looks at how much of the masks has changed
FASTER = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Where masks differ in at least this fraction of the number kept, the penalty grows by this factor."""


@dataclass(frozen=True)
class ALPS:
    """Which weights and which values at once: min tr (W - W') H (W - W')^T over W' with so many weights, by ADMM.

    Meng et al. 2024 (arXiv:2406.07831), section 3. The layer has two copies, W without zeros and the sparse D; in turn
    W = (W_0 H - V + r D)(H + r I)^-1, D = the largest of W + V / r, V += r (W - D). The penalty r grows, the slower the
    less the masks still change, until they rest; then the kept weights take their best values, as by `LeastSquares`.
    H = X X^T + damping, scaled to a diagonal of ones. The scope says how many weights each layer, row or block of m
    keeps. The authors' code lowers a first penalty at which nothing changes; here it ends there.

    Cost: as for `SparseGPT`, an eigendecomposition of one (in, in) matrix, some fifty products of it with the weights,
        and the systems of `LeastSquares`: out times in^3 operations.

    When: one-shot pruning without fine-tuning, above 50 %, where time for each layer does not matter.

    Args:
        penalty: r of the first steps, above 0.
        num_steps: at most, at least 1.
        damping: what is added to the diagonal of H, as a fraction of its mean, above 0.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> ALPS(num_steps=100)
        ALPS(penalty=0.1, num_steps=100, damping=0.01)
    """

    penalty: float = 0.1
    num_steps: int = 300
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_positive("penalty", self.penalty)
        check_count("num_steps", self.num_steps, minimum=1)
        check_positive("damping", self.damping)

    def __call__(self, *, weight: Tensor, gram: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
        quadratic = damped(gram.double(), self.damping)
        mask = self._split(weight.double() * (gram.diagonal() > 0), quadratic, quota)
        return best_values(weight, quadratic, mask), mask

    def _split(self, weight: Tensor, quadratic: Tensor, quota: Quota) -> Tensor:
        """Return the masks at which the two copies agree."""
        import torch

        scale = quadratic.diagonal().sqrt()
        scaled, penalty = weight * scale, self.penalty
        values, vectors = torch.linalg.eigh(quadratic / scale / scale[:, None])
        goal = (scaled @ vectors * values) @ vectors.t()
        mask = quota.choose(scaled.square().float(), 0)
        sparse, multiplier = scaled * mask, torch.zeros_like(scaled)
        known = mask
        for step in range(1, self.num_steps + 1):
            dense = ((goal - multiplier + penalty * sparse) @ vectors / (values + penalty)) @ vectors.t()
            moved = dense + multiplier / penalty
            mask = quota.choose(moved.square().float(), 0)
            sparse = moved * mask
            multiplier = multiplier + penalty * (dense - sparse)
            if step % PERIOD == 0:
                changed = int((mask ^ known).sum()) / max(1, int(mask.sum()))
                if not changed:
                    break
                penalty *= next(factor for least, factor in FASTER if changed >= least)
                known = mask
        return mask
