"""Criteria that need gradients of the loss: one backward pass, or a sum over training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Saliency:
    """What the loss would change by, to first order, without the weight: s = |w dL/dw|.

    Molchanov et al. 2016 (arXiv:1611.06440), eq. 7, for single weights; on a network at initialisation it is
    SNIP's connection sensitivity up to a factor, Lee et al. 2018 (arXiv:1810.02340), eq. 5.

    Cost: one backward pass for each calibration batch, or none in training; one gradient kept per weight.

    When: before training (recipe `snip`), or where weights of unlike layers have to be compared.

    Example:
        >>> import torch
        >>> Saliency()(weight=torch.tensor([2.0, -1.0]), grad=torch.tensor([-3.0, 4.0]))
        tensor([6., 4.])
    """

    by_rows: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, grad: Tensor) -> Tensor:
        return (weight * grad).abs()


@dataclass(frozen=True)
class GradientMagnitude:
    """Where the loss would fall fastest: s = |dL/dw|, of inactive weights too.

    Evci et al. 2020, RigL (arXiv:1911.11134), section 3(4), and Dettmers & Zettlemoyer 2019 (arXiv:1907.04840) grow
    weights so; a weight at zero has a gradient, but no saliency.

    Cost: the gradient of all weights at an update; nothing in between.

    When: to grow weights in `SparseTraining` (recipe `rigl`).

    Example:
        >>> import torch
        >>> GradientMagnitude()(grad=torch.tensor([-3.0, 1.0]))
        tensor([3., 1.])
    """

    by_rows: ClassVar[bool] = True

    def __call__(self, *, grad: Tensor) -> Tensor:
        return grad.abs()


@dataclass(frozen=True)
class MeanGradient:
    """Where the loss has fallen fastest since the last update: s = |mean of dL/dw over the steps|.

    The gradient of one batch, by which RigL grows, is mostly noise where batches are small and the loss is low already.
    Dettmers & Zettlemoyer 2019, sparse momentum (arXiv:1907.04840), section 3.2, smooth it exponentially; here all
    steps since the last update count alike.

    Cost: one addition and one float32 per weight at each step.

    When: to grow weights in `SparseTraining` (recipe `rigl_mean`) with batches of some hundred examples or fewer.

    Example:
        >>> import torch
        >>> MeanGradient()(grad_mean=torch.tensor([-3.0, 1.0]))
        tensor([3., 1.])
    """

    by_rows: ClassVar[bool] = True

    def __call__(self, *, grad_mean: Tensor) -> Tensor:
        return grad_mean.abs()


@dataclass(frozen=True)
class Taylor:
    """The squared change of the loss, to first order, without the weight: s = (w dL/dw)^2.

    Molchanov et al. 2019 (arXiv:1906.10771), section 3.1; a group's score is the sum over its weights. Single weights
    rank as by `Saliency`, groups do not: here few influential weights outweigh many indifferent ones. The gradient is
    the mean over all calibration batches; the authors' code averages the squares of the batches, as `Fisher` does.

    Cost: one backward pass for each calibration batch, or none in training; one gradient kept per weight.

    When: channels and neurons of a trained model, or while it is fine-tuned.

    Example:
        >>> import torch
        >>> Taylor()(weight=torch.tensor([2.0, -1.0]), grad=torch.tensor([-3.0, 4.0]))
        tensor([36., 16.])
    """

    by_rows: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, grad: Tensor) -> Tensor:
        return (weight * grad).square()


@dataclass(frozen=True)
class Fisher:
    """Optimal brain damage with the empirical Fisher information for the Hessian: s = w^2 E[(dL/dw)^2] / 2.

    LeCun et al. 1990 with the diagonal that Theis et al. 2018, Fisher pruning (arXiv:1801.05787), take: near a minimum
    gradients cancel, their squares do not. The mean is over calibration batches, one gradient for each, or in training
    over the steps since the last update; small batches estimate it better.

    Cost: one backward pass for each calibration batch, or none in training; one float32 per weight, noted at each step.

    When: a trained model whose gradients average out, so that `Saliency` sees noise.

    Example:
        >>> import torch
        >>> Fisher()(weight=torch.tensor([2.0, -1.0]), grad_square=torch.tensor([1.0, 6.0]))
        tensor([2., 3.])
    """

    by_rows: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, grad_square: Tensor) -> Tensor:
        return weight.square() * grad_square / 2


@dataclass(frozen=True)
class Movement:
    """Weights that training drives away from zero are kept: s = - sum over steps of w dL/dw.

    Sanh et al. 2020 (arXiv:2005.07683), eq. 4 up to the learning rate. `movement` is summed over each optimizer
    step since training began, so the first update must not come before the first step.

    Cost: no pass, two operations a step; one number per weight.

    When: fine-tuning a pretrained model to a high sparsity.

    Example:
        >>> import torch
        >>> Movement()(movement=torch.tensor([0.5, -0.1]))
        tensor([ 0.5000, -0.1000])
    """

    by_rows: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def __call__(self, *, movement: Tensor) -> Tensor:
        return movement
