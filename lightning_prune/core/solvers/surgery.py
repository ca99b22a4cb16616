"""Optimal brain surgery by the inputs of a layer: the best values for given masks, or masks column by column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.core.checks import check_count, check_positive
from lightning_prune.core.solvers import best_values, damped

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.core.quotas import Quota


@dataclass(frozen=True)
class LeastSquares:
    """The best values for the weights that stay: for each row r with kept places S, w'_S = (G_SS)^-1 G_S w.

    The minimum of ||w X - w' X||^2 over w' that are zero outside of S, G being X X^T: the normal equations, as in
    Hassibi & Stork 1993 (optimal brain surgeon), eq. 5, for several weights at once. Masks stay those of criterion and
    scope, structured ones too. Where channels or heads are taken out (He et al. 2017, arXiv:1707.06168, section
    3.1), the layers that lose inputs are solved for, and a bias makes up for the means of what goes.

    Cost: a pass over the calibration data for each layer, one (in, in) matrix of it in memory at a time; out times in^3
        operations, in^3 where all rows lose the same.

    When: after one-shot pruning with any criterion, most of all of channels, before fine-tuning or without any.

    Args:
        damping: what is added to the diagonal of G, as a fraction of its mean, above 0.

    Raises:
        ValueError: `damping` is not above 0.

    Example:
        >>> import torch
        >>> weight, gram = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> LeastSquares(damping=1e-6)(weight=weight, gram=gram, mask=torch.tensor([[True, False]]))[0]
        tensor([[1.5000, 0.0000]])
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        check_positive("damping", self.damping)

    def __call__(self, *, weight: Tensor, gram: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return best_values(weight, damped(gram.double(), self.damping), mask), mask


@dataclass(frozen=True)
class SparseGPT:
    """Weights are pruned column by column, and those to the right make up for it: optimal brain surgery at scale.

    Frantar & Alistarh 2023 (arXiv:2301.00774), algorithm 1. With H = X X^T + damping, and F_j the inverse of H without
    the first j columns, weight w_j is pruned at the cost w_j^2 / [F_j]_00, the cheapest of each block of columns first,
    and the columns k to its right change by -w_j / [F_j]_00 [F_j]_0k. The inverses come from one Cholesky
    decomposition. The scope says how many weights each layer, row or block of m keeps; the criterion only counts where
    it compares layers.

    Cost: a pass over the calibration data for each layer or block, the (in, in) matrices of one layer or block in
        memory at a time, in float64; in^3 operations.

    When: one-shot pruning of a large model without fine-tuning, at 50 % or 2:4.

    Args:
        block_size: columns whose masks are chosen at once, at least 1; N:M chooses in blocks of m, and the block is as
            many of them as it takes.
        damping: what is added to the diagonal of H, as a fraction of its mean, above 0.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> SparseGPT(block_size=64)
        SparseGPT(block_size=64, damping=0.01)
    """

    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size, minimum=1)
        check_positive("damping", self.damping)

    def __call__(self, *, weight: Tensor, gram: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
        import torch

        is_dead = (
            gram.diagonal() == 0
        )  # an input that is never on goes first, and keeps its weights where it stays
        left = weight * ~is_dead
        lower = torch.linalg.cholesky(damped(gram.double(), self.damping))
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(weight.dtype)
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        span = quota.span or 1
        size = -(-self.block_size // span) * span
        for start in range(0, weight.shape[1], size):
            part = slice(start, min(start + size, weight.shape[1]))
            block, factors = left[:, part], upper[part, part]
            mask[:, part], errors = self._block(block, factors, start, quota)
            left[:, part.stop :] -= errors @ upper[part, part.stop :]
        return torch.where(is_dead, weight, left) * mask, mask

    @staticmethod
    def _block(block: Tensor, factors: Tensor, start: int, quota: Quota) -> tuple[Tensor, Tensor]:
        """Prune a block of columns in place; return its mask, and what the columns right of it have to make up for."""
        import torch

        mask, errors = torch.ones_like(block, dtype=torch.bool), torch.zeros_like(block)
        diagonal, step = factors.diagonal(), quota.span or block.shape[1]
        for j in range(block.shape[1]):
            if j % step == 0:
                scores = (block[:, j : j + step] / diagonal[j : j + step]).square()
                mask[:, j : j + step] = quota.choose(scores, start + j)
            errors[:, j] = block[:, j] * ~mask[:, j] / diagonal[j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * factors[j, j + 1 :]
        return mask, errors
