"""Criteria that look at what flows through the layer: forward hooks while training, or on calibration batches.

The statistics have the dims of the weight, with size 1 where they do not vary: `input_norm` is (1, in, 1, 1) for
a convolution, `output_mean` and `output_positive` are (out, 1, 1, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Wanda:
    """A small weight on a loud input matters: s_ij = |w_ij| ||x_j||_2.

    Sun et al. 2023 (arXiv:2306.11695), eq. 1; the paper compares within each row, `scope=PerRow()`. ||x_j|| is
    taken over all tokens (or pixels) of all batches that were seen, of the model as it is then: in one shot the dense
    one, where the authors' code goes on from block to pruned block.

    Cost: one forward pass for each calibration batch, or none in training; one number per input.

    When: language models in one shot, with few and large outlier features, and no time for `SparseGPT`.

    Example:
        >>> import torch
        >>> Wanda()(weight=torch.tensor([[1.0, -2.0]]), input_norm=torch.tensor([[4.0, 1.0]]))
        tensor([[4., 2.]])
    """

    by_rows: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, input_norm: Tensor) -> Tensor:
        return weight.abs() * input_norm


@dataclass(frozen=True)
class MeanActivation:
    """Quiet neurons go: s_i = mean |a_i| of the layer's output i. Molchanov et al. 2016 (arXiv:1611.06440), 2.2.

    The absolute value keeps outputs of both signs from cancelling (the paper's come out of a ReLU). Each weight of
    an output gets its score: use it with `granularity=Slice(dim=0)`.

    Cost: one forward pass for each calibration batch, or none in training; one number per output.

    When: neurons and channels, where no loss is at hand.

    Example:
        >>> import torch
        >>> MeanActivation()(weight=torch.ones(2, 2), output_mean=torch.tensor([[3.0], [1.0]]))
        tensor([[3., 3.],
                [1., 1.]])
    """

    by_rows: ClassVar[bool] = True
    per_output: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, output_mean: Tensor) -> Tensor:
        return output_mean.expand(weight.shape)


@dataclass(frozen=True)
class ActivationVariance:
    """Outputs that hardly vary can go: s_i = Var a_i over all examples and positions of the layer's output i.

    Polyak & Wolf 2015, Channel-level acceleration of deep face representations, whose inbound pruning ranks by such a
    variance: what an output has in common with all examples, a bias can make up for, however large it is. Use it with
    `granularity=Slice(dim=0)`.

    Cost: one forward pass for each calibration batch, or none in training; two float64 per output.

    When: neurons and channels with outputs far from zero, which `MeanActivation` would keep.

    Example:
        >>> import torch
        >>> ActivationVariance()(weight=torch.ones(2, 1), output_variance=torch.tensor([[4.0], [0.0]])).flatten()
        tensor([4., 0.])
    """

    by_rows: ClassVar[bool] = True
    per_output: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, output_variance: Tensor) -> Tensor:
        return output_variance.expand(weight.shape)


@dataclass(frozen=True)
class APoZ:
    """Neurons that are mostly off go: s_i = 1 - APoZ_i, the fraction of outputs that a ReLU would let through.

    Hu et al. 2016, average percentage of zeros (arXiv:1607.03250), eq. 1. It is counted on the layer's own output
    as the share above zero, which is what a ReLU right behind it passes on. Use it with `granularity=Slice(dim=0)`.

    Cost: one forward pass for each calibration batch, or none in training; one number per output.

    When: neurons and channels in front of a ReLU.

    Example:
        >>> import torch
        >>> APoZ()(weight=torch.ones(2, 1), output_positive=torch.tensor([[0.25], [0.5]])).flatten()
        tensor([0.2500, 0.5000])
    """

    by_rows: ClassVar[bool] = True
    per_output: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, output_positive: Tensor) -> Tensor:
        return output_positive.expand(weight.shape)


@dataclass(frozen=True)
class BatchNormScale:
    """Channels that their batch norm scales down can go: s_i = |gamma_i| of the norm right behind the layer.

    Liu et al. 2017, network slimming (arXiv:1708.06519), section 3; the paper trains with an L1 penalty on gamma first
    and compares over the whole network. For coupled channels, `granularity=Channel(normalize="none")`, the norms of all
    layers that write them count; single layers take `granularity=Slice(dim=0)`. Each layer that is pruned has to have a
    batch norm: exclude others.

    Cost: one forward pass, which shows what norm reads what; the weights of the norms are read.

    When: channels of convolutional networks with batch norms, above all where gamma was trained to be sparse.

    Example:
        >>> import torch
        >>> BatchNormScale()(weight=torch.ones(2, 1), norm_scale=torch.tensor([[0.5], [0.0]])).flatten()
        tensor([0.5000, 0.0000])
    """

    by_rows: ClassVar[bool] = True
    per_output: ClassVar[bool] = True

    def __call__(self, *, weight: Tensor, norm_scale: Tensor) -> Tensor:
        return norm_scale.expand(weight.shape)
