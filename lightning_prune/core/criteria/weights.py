"""Criteria that look at the weights alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_prune.core.checks import check_count, check_positive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Magnitude:
    """Large weights matter: s = |w|^p. Han et al. 2015 (arXiv:1506.02626), section 3.

    For single weights every p ranks alike. Summed over a group it is the L1 norm at p = 1 (Li et al. 2016,
    arXiv:1608.08710) and the square of the L2 norm at p = 2.

    Cost: nothing beyond reading the weights.

    When: first; and while a model trains, where little else does better.

    Args:
        p: above 0.

    Raises:
        ValueError: `p` is not above 0.

    Example:
        >>> import torch
        >>> Magnitude(p=2)(weight=torch.tensor([[-3.0, 1.0]]))
        tensor([[9., 1.]])
    """

    by_rows: ClassVar[bool] = True
    p: float = 1.0

    def __post_init__(self) -> None:
        check_positive("p", self.p)

    def __call__(self, *, weight: Tensor) -> Tensor:
        return weight.abs() if self.p == 1 else weight.abs().pow(self.p)


@dataclass(frozen=True)
class Random:
    """The baseline that every other criterion has to beat: s ~ U[0, 1), a function of seed and name alone.

    The same weight has the same score in each update, in each process and after a resume.

    Cost: one random number per weight.

    When: as a control, or where a sparse layout is all that counts.

    Args:
        seed: at least 0.

    Raises:
        ValueError: `seed` is no whole number of at least 0.

    Example:
        >>> import torch
        >>> a, b = (Random(seed=1)(weight=torch.zeros(2, 2), name=n) for n in ("net.0.weight", "net.0.weight"))
        >>> torch.equal(a, b)
        True
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_count("seed", self.seed, minimum=0)

    def __call__(self, *, weight: Tensor, name: str) -> Tensor:
        import torch

        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return torch.rand(weight.shape, generator=generator).to(weight.device)


@dataclass(frozen=True)
class GeometricMedian:
    """Filters near to all others can be replaced by them: s_i = sum_j ||F_i - F_j||_2.

    He et al. 2019, FPGM (arXiv:1811.00250), eq. 4. F_i is the i-th slice of dim 0 (a filter, a neuron), and each
    of its weights gets the score of the whole: use it with a granularity that removes whole slices of dim 0.

    Cost: the distances of all pairs of a layer's filters.

    When: filters and neurons with like norms, where many are nearly the same.

    Example:
        >>> import torch
        >>> GeometricMedian()(weight=torch.tensor([[0.0], [1.0], [5.0]])).flatten()
        tensor([6., 5., 9.])
    """

    per_output: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor) -> Tensor:
        import torch

        filters = weight.detach().flatten(1).float()
        distances = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
        return distances.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)
