"""Penalties that drive whole coupled groups towards zero while a model trains, so that little is lost with them.

A regularizer turns the norms of a group's indices (what goes as one piece) into factors: the gradient of each weight w
of index k grows by factor_k w. Every penalty that depends on the norms alone has a gradient of this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.core.checks import check_choice, check_noun, check_positive
from lightning_prune.core.types import Couples, Granularity, Regularizer

if TYPE_CHECKING:
    from torch import Tensor

OVER = ("weights", "scales")


@dataclass(frozen=True)
class GroupLasso:
    """A penalty that makes whole groups zero: R = strength sum_k sqrt(n_k) ||w_k||_2, with gradient factor_k w.

    Yuan & Lin 2006, with factor_k = strength sqrt(n_k) / ||w_k||, over the coupled groups of Fang et al. 2023
    (arXiv:2301.12900): w_k are all n_k weights that go with index k, and an index that is zero stays where it is. Over
    the "scales" of batch norms alone it is the L1 penalty of network slimming, Liu et al. 2017 (arXiv:1708.06519),
    where an index has one batch norm, and the norm of its scales where a residual couples several.

    Cost: a pass over the weights in each step, as much as a weight decay.

    When: structured pruning from a training that has time for it; with `over="scales"` and `BatchNormScale` it is
        network slimming.

    Args:
        strength: above 0; 1e-4 for "scales" in the paper.
        over: all "weights" that go with an index, or the "scales" of its batch norms alone.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch
        >>> GroupLasso(strength=0.1)(norm=torch.tensor([2.0, 0.0]), count=torch.tensor([4, 4]))
        tensor([0.1000, 0.0000])
    """

    strength: float = 1e-4
    over: str = "weights"

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)
        check_choice("over", self.over, OVER)

    def __call__(self, *, norm: Tensor, count: Tensor) -> Tensor:
        factor = self.strength * count.to(norm.dtype).sqrt() / norm
        return factor.masked_fill(norm == 0, 0.0)


@dataclass(frozen=True)
class GroupDecay:
    """Weight decay that weak groups feel most: R = strength / 2 sum_k g_k ||w_k||^2 and factor_k = strength g_k.

    Fang et al. 2023, DepGraph's sparse learning (arXiv:2301.12900), eq. 4, with g_k = 2^(steepness d_k) and
    d_k = (max - ||w_k||) / (max - min) over the indices of a group: the weakest decay 2^steepness times as fast as the
    strongest. The paper's code takes the gradient with g_k held, as here, and leaves biases out, which here belong to
    their index.

    Cost: as for `GroupLasso`.

    When: structured pruning from a training that has time for it; gentler than `GroupLasso`, which pulls all indices
        by the same force.

    Args:
        strength: above 0.
        steepness: above 0; 4 in the paper.
        over: as for `GroupLasso`.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch
        >>> GroupDecay(strength=0.1, steepness=1.0)(norm=torch.tensor([3.0, 1.0]), count=torch.tensor([4, 4]))
        tensor([0.1000, 0.2000])
    """

    strength: float = 1e-4
    steepness: float = 4.0
    over: str = "weights"

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)
        check_positive("steepness", self.steepness)
        check_choice("over", self.over, OVER)

    def __call__(self, *, norm: Tensor, count: Tensor) -> Tensor:
        spread = (norm.max() - norm.min()).clamp_min(1e-30)
        return self.strength * 2.0 ** (self.steepness * (norm.max() - norm) / spread)


def checked_regularizer(
    regularizer: Regularizer | None, granularity: Granularity | Couples
) -> Regularizer | None:
    """Return a regularizer that fits the granularity.

    Raises:
        ValueError: what is no regularizer, or a granularity without coupled groups.
    """
    if regularizer is not None:
        check_noun("regularizer", regularizer, "GroupLasso()", "__call__")
    if regularizer is not None and not isinstance(granularity, Couples):
        raise ValueError(
            f"`regularizer` is for granularities of coupled groups, Channel and Head, but got {regularizer} with "
            f"{granularity}."
        )
    return regularizer
