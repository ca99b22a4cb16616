"""Optimal brain surgery by the curvature of the loss, which gradients estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.core.checks import check_count, check_positive
from lightning_prune.core.solvers import best_values

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.core.quotas import Quota


@dataclass(frozen=True)
class WoodFisher:
    """Block-wise optimal brain surgery by the empirical Fisher: the cost of weight q is w_q^2 / (2 [F^-1]_qq).

    Singh & Alistarh 2020 (arXiv:2004.14340), section 3 and eq. 12; F = (1 / N) sum of g g^T + damping, over gradients g
    of the loss, one for each calibration batch, in blocks of `block_size` neighbouring weights. The weights of a block
    that stay make up for all that go together, w'_S = (F_SS)^-1 (F w)_S, where the paper adds up what each would ask
    for alone. The scope says how many weights each layer, row or block of m keeps.

    Cost: for each layer one backward pass for each calibration batch, whatever the number of layers, and in memory
        their N gradients of that layer and `block_size` float64 for each of its weights, of one layer at a time.

    When: a trained model and many small calibration batches, where the loss counts and not what a layer computes.

    Args:
        block_size: neighbouring weights whose curvature is known together, at least 1; 1 is the diagonal.
        damping: what is added to the diagonal of F, as a fraction of the layer's mean, above 0; fewer gradients than
            `block_size` need more of it.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> WoodFisher(block_size=32)
        WoodFisher(block_size=32, damping=0.1)
    """

    block_size: int = 64
    damping: float = 0.1

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size, minimum=1)
        check_positive("damping", self.damping)

    def __call__(self, *, weight: Tensor, gradients: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
        import torch

        size = min(self.block_size, weight.numel())
        wide = gradients.double()
        wide = wide / wide.square().mean().sqrt().clamp_min(1e-30)  # the mean of F's diagonal is 1 then
        blocks = self._blocks(wide.flatten(1), size)
        fisher = torch.einsum("nbi,nbj->bij", blocks, blocks) / len(blocks)
        is_felt = fisher.diagonal(dim1=-2, dim2=-1) > 0  # an input that is never on leaves the loss as it is
        fisher += self.damping * torch.eye(size, dtype=fisher.dtype, device=fisher.device)
        split = self._blocks(weight.flatten()[None], size)[0]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher)).diagonal(dim1=-2, dim2=-1)
        costs = split.double().square() / (2 * inverse) * is_felt
        mask = quota.choose(costs.flatten()[: weight.numel()].view(weight.shape).float(), 0)
        kept = self._blocks(mask.flatten()[None], size)[0]
        new = best_values(split, fisher, kept)
        return new.flatten()[: weight.numel()].view(weight.shape), mask

    @staticmethod
    def _blocks(flat: Tensor, size: int) -> Tensor:
        """Return (N, weights) as (N, blocks, size); what is missing to whole blocks is zero."""
        import torch

        num_blocks = math.ceil(flat.shape[1] / size)
        padded: Tensor = torch.nn.functional.pad(flat, (0, num_blocks * size - flat.shape[1]))
        return padded.reshape(len(flat), num_blocks, size)
