"""Criteria that need gradients of the loss: one backward pass, or its sum over training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Saliency:
    """What the loss would change by, to first order, without the weight: s = |w dL/dw|.

    Molchanov et al. 2016 (arXiv:1611.06440), eq. 7, for single weights; on a network at initialisation it is
    SNIP's connection sensitivity up to a factor, Lee et al. 2018 (arXiv:1810.02340), eq. 5.

    Example:
        >>> import torch
        >>> Saliency()(weight=torch.tensor([2.0, -1.0]), grad=torch.tensor([-3.0, 4.0]))
        tensor([6., 4.])
    """

    def __call__(self, *, weight: Tensor, grad: Tensor) -> Tensor:
        return (weight * grad).abs()


@dataclass(frozen=True)
class Movement:
    """Weights that training drives away from zero are kept: s = - sum over steps of w dL/dw.

    Sanh et al. 2020 (arXiv:2005.07683), eq. 4 up to the learning rate. `movement` is summed over each optimizer
    step since training began, so the first update must not come before the first step.

    Example:
        >>> import torch
        >>> Movement()(movement=torch.tensor([0.5, -0.1]))
        tensor([ 0.5000, -0.1000])
    """

    def __call__(self, *, movement: Tensor) -> Tensor:
        return movement
