"""What becomes of pruned weights while masks may still change: their values live on beside the network.

The network reads masked weights at all times. Where a masking is given, an optimizer steps the weights behind them,
which the masking tells the gradient of; new masks are chosen by those, so that what was pruned may come back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_prune import core
from lightning_prune.core.checks import check_noun, check_range
from lightning_prune.core.types import Couples, Granularity, Masking

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StraightThrough:
    """Pruned weights go on learning, as if the mask were not there: dL/dw = dL/d(m w) + decay (1 - m) w.

    The straight-through estimator of Bengio et al. 2013 (arXiv:1308.3432). Lin et al. 2020, DPF (arXiv:2006.07253),
    eq. 2, train so under masks that are renewed every few steps; Zhou et al. 2021, SR-STE (arXiv:2102.04010), eq. 9,
    add the decay of pruned weights, which keeps masks from changing to and fro.

    Cost: a copy of the weights in memory and in checkpoints until the window ends, and two copies of it a step.

    When: masks that are chosen early or often, N:M above all, so that weights pruned by mistake come back.

    Args:
        decay: of pruned weights towards zero, at least 0; it is added to their gradient, 2e-4 in SR-STE.

    Raises:
        ValueError: `decay` is below 0.

    Example:
        >>> import torch
        >>> weight, mask = torch.tensor([2.0, 4.0]), torch.tensor([True, False])
        >>> StraightThrough(decay=0.5).gradient(weight=weight, grad=torch.tensor([1.0, 1.0]), mask=mask)
        tensor([1., 3.])
    """

    by_rows: ClassVar[bool] = True
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("decay", self.decay, 0.0, float("inf"), "a number of at least 0")

    def gradient(self, *, weight: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        return grad + self.decay * weight.masked_fill(mask, 0.0) if self.decay else grad


@dataclass(frozen=True)
class Dormant:
    """Pruned weights sleep: they keep the value that they had, and wake with it: dL/dw = m dL/d(m w).

    The plain derivative of m w. Of a criterion by gradients the sums go on, with the sleeping value: with `Movement`
    they are the scores that movement pruning learns, Sanh et al. 2020 (arXiv:2005.07683), eq. 3 and 4, S being stepped
    by plain gradient descent.

    Cost: as for `StraightThrough`.

    When: fine-tuning a pretrained model, whose weights know something, with `Movement` (recipe `soft_movement`).

    Example:
        >>> import torch
        >>> weight, mask = torch.tensor([2.0, 4.0]), torch.tensor([True, False])
        >>> Dormant().gradient(weight=weight, grad=torch.tensor([1.0, 1.0]), mask=mask)
        tensor([1., 0.])
    """

    by_rows: ClassVar[bool] = True

    def gradient(self, *, weight: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        return grad.masked_fill(~mask, 0.0)


@dataclass(frozen=True)
class TopKAST:
    """The largest of the pruned weights learn too, and the others rest: dL/dw = b dL/d(m w) + the exploration's decay.

    Jayakumar et al. 2020 (arXiv:2106.03517), section 2: the network reads the top-k weights, A, and the gradient goes
    to a larger set B, here A and the largest of the others, as many as `wider` of all weights. What only learns
    decays by `decay` / density of A, as in the paper's exploration loss, so that it comes in where it is worth more
    than what is there; active weights have the optimizer's own weight decay. The gradient of the rest is zero: plain
    gradient descent leaves it as it is, while momentum and the optimizer's weight decay go on.

    Cost: as for `StraightThrough`, and a selection among the weights of each layer in each step.

    When: sparse training from the first step with places that change, with gradients for a part of the weights only
        (recipe `top_kast`).

    Args:
        wider: the fraction of a layer's weights that learn beyond those that are active, in [0, 1].
        decay: at least 0; divided by the density it is added to the gradient of what only learns.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch
        >>> weight, mask = torch.tensor([2.0, 0.5, 1.0, 0.1]), torch.tensor([True, False, False, False])
        >>> TopKAST(wider=0.25, decay=0.0).gradient(weight=weight, grad=torch.ones(4), mask=mask)
        tensor([1., 0., 1., 0.])
    """

    wider: float = 0.1
    decay: float = 1e-4

    def __post_init__(self) -> None:
        check_range("wider", self.wider, 0.0, 1.0, "a fraction in [0, 1]")
        check_range("decay", self.decay, 0.0, float("inf"), "a number of at least 0")

    def gradient(self, *, weight: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        active = int(mask.sum())
        num_others = min(round(self.wider * mask.numel()), mask.numel() - active)
        others = weight.abs().masked_fill(mask, -math.inf)
        learning = core.keep_top({"": others}, num_others)[""]
        rate = self.decay * mask.numel() / max(active, 1)
        return (grad + rate * weight.masked_fill(mask, 0.0)).masked_fill(~(mask | learning), 0.0)


def checked_masking(masking: Masking | None, granularity: Granularity | Couples) -> Masking | None:
    """Return a masking that fits the granularity.

    Raises:
        ValueError: it is none, or the granularity takes pieces out of the model, which cannot live on.
    """
    if masking is not None:
        check_noun("masking", masking, "StraightThrough()", "gradient")
    if masking is not None and isinstance(granularity, Couples):
        raise ValueError(
            f"`masking` is for granularities of single tensors, but got {masking} with {granularity}."
        )
    return masking
