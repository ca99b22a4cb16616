"""Criteria that need second derivatives of the loss, or gradients of something else: calibration batches only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OBD:
    """Optimal brain damage: what the loss would change by, to second order, at a minimum: s = h_ii w_i^2 / 2.

    LeCun et al. 1990, section 2. The diagonal h_ii of the Hessian is Hutchinson's estimate E[z (H z)] over random signs
    z (Bekas et al. 2007; Yao et al. 2020, arXiv:2006.00719), one z for each calibration batch, always the same ones.
    Where it is negative, removing the weight is expected to lower the loss, and the score says so.

    Cost: two backward passes for each calibration batch, with the graph of the first kept; three numbers per weight.

    When: a trained model and many calibration batches; `Fisher` is cheaper, and never negative.

    Example:
        >>> import torch
        >>> OBD()(weight=torch.tensor([2.0, -1.0]), hessian_diagonal=torch.tensor([1.0, 6.0]))
        tensor([2., 3.])
    """

    signed: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, hessian_diagonal: Tensor) -> Tensor:
        return weight.square() * hessian_diagonal / 2


@dataclass(frozen=True)
class SecondOrderTaylor:
    """The squared change of the loss, to second order, without the weight: s = (g_i w_i - h_ii w_i^2 / 2)^2.

    Molchanov et al. 2019 (arXiv:1906.10771), section 3.1, with the diagonal alone of the Hessian, which is estimated as
    for `OBD`. It serves where the model is not at the minimum that `OBD` supposes.

    Cost: three backward passes for each calibration batch, with the graph of one kept; four numbers per weight.

    When: a model that is still being trained, where neither gradient nor curvature can be left out.

    Example:
        >>> import torch
        >>> numbers = {"grad": torch.tensor([1.0]), "hessian_diagonal": torch.tensor([6.0])}
        >>> SecondOrderTaylor()(weight=torch.tensor([2.0]), **numbers)
        tensor([100.])
    """

    def __call__(self, *, weight: Tensor, grad: Tensor, hessian_diagonal: Tensor) -> Tensor:
        return (weight * grad - weight.square() * hessian_diagonal / 2).square()


@dataclass(frozen=True)
class GraSP:
    """Keep what the gradient flow needs: s = w (H g), with g the gradient and H the Hessian of the loss.

    Wang et al. 2020 (arXiv:2002.07376), eq. 8: without the weight, g^T g / 2 changes by -w (H g) to first order, and
    those weights go without which it is largest; the score is the negative of the paper's. H and g are in the pruned
    weights alone, over all calibration batches. The paper's code divides the logits by 200 first, which your
    `training_step` would have to do.

    Cost: three backward passes for each calibration batch, with the graph of one kept; three numbers per weight.

    When: before training, at 90 % and above; take about ten examples of each class.

    Example:
        >>> import torch
        >>> GraSP()(weight=torch.tensor([2.0, -1.0]), hessian_gradient=torch.tensor([1.0, 6.0]))
        tensor([ 2., -6.])
    """

    signed: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, hessian_gradient: Tensor) -> Tensor:
        return weight * hessian_gradient


@dataclass(frozen=True)
class SynFlow:
    """Keep all that the paths through the network add up to: s = |w| dR/d|w|, R = 1^T |W_L| ... |W_1| 1.

    Tanaka et al. 2020 (arXiv:2006.05467), algorithm 1. No data is read: weights are made positive and the input is one
    everywhere (`flow_gradients`). In many rounds (100 in the paper, `InitialPruning(num_rounds=100)`) no layer is lost
    before it has to be; in a single one, thin layers may be. Scores are relative to the largest gradient.

    Cost: one forward and backward pass in float64 for one example and each round; weights once more in float64.

    When: before training, convolutional and fully connected networks, at the highest sparsities. Not for attention:
    through a softmax of equal scores nothing flows to queries and keys.

    Example:
        >>> import torch
        >>> SynFlow()(weight=torch.tensor([2.0, -1.0]), flow_gradient=torch.tensor([0.5, 1.0]))
        tensor([1., 1.])
    """

    def __call__(self, *, weight: Tensor, flow_gradient: Tensor) -> Tensor:
        return weight.abs() * flow_gradient
