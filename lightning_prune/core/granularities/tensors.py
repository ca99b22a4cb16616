"""What goes as one piece: `reduce` turns scores of weights into scores of groups, `expand` group masks into masks.

Groups compete as wholes, so a sparsity is the fraction of groups removed; where all groups have one size, it is
the fraction of weights as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_prune.core.checks import check_choice, check_count

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.core.types import Shape

REDUCTIONS = ("mean", "sum", "max")


@dataclass(frozen=True)
class Weight:
    """Each weight alone (unstructured).

    Cost: nothing.

    When: the fewest weights at the same accuracy; speed takes a sparse kernel or format, as of `accelerate` and
        `export_weights`.

    Example:
        >>> import torch
        >>> Weight().reduce(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]])
    """

    by_rows: ClassVar[bool] = True

    def reduce(self, scores: Tensor) -> Tensor:
        return scores

    def expand(self, mask: Tensor, shape: Shape) -> Tensor:
        return mask.view(shape)


@dataclass(frozen=True)
class Slice:
    """All weights with one index along `dim`: a row, neuron or filter at 0, a column or input channel at 1.

    Only the mask is structured here, the shapes stay. Li et al. 2016 (arXiv:1608.08710) rank filters so.

    Cost: one number for each slice.

    When: neurons, filters or input channels of single layers, where shapes have to stay; `Channel` takes them out.

    Args:
        dim: at least 0; of a linear or convolution weight, 0 is the output and 1 the input.
        reduction: how the scores of a slice become one, "mean", "sum" or "max". The mean lets slices of unlike
            size compete fairly in a global scope.

    Raises:
        ValueError: a negative `dim`, an unknown `reduction`, or (in use) a weight without that dim.

    Example:
        >>> import torch
        >>> rows = Slice(dim=0)
        >>> rows.reduce(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        tensor([2., 5.])
        >>> rows.expand(torch.tensor([False, True]), (2, 2))
        tensor([[False, False],
                [ True,  True]])
    """

    dim: int = 0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_count("dim", self.dim, minimum=0)
        check_choice("reduction", self.reduction, REDUCTIONS)

    @property
    def by_rows(self) -> bool:
        """Whether slices are rows."""
        return self.dim == 0

    def reduce(self, scores: Tensor) -> Tensor:
        if self.dim >= scores.dim():
            raise ValueError(
                f"`dim` is below the number of dims, but got {self.dim} for shape {tuple(scores.shape)}."
            )
        return _reduced(scores.movedim(self.dim, 0).flatten(1), self.reduction)

    def expand(self, mask: Tensor, shape: Shape) -> Tensor:
        aligned = mask.view([-1 if d == self.dim else 1 for d in range(len(shape))])
        return aligned.expand(shape).contiguous()


@dataclass(frozen=True)
class Kernel:
    """All weights between one input and one output channel: the k x k kernel of a convolution.

    Mao et al. 2017 (arXiv:1705.08922), "2-D kernel" granularity. A linear layer has kernels of one weight.

    Cost: one number for each kernel.

    When: convolutions for code that skips whole kernels; linear layers are pruned by weight.

    Args:
        reduction: "mean", "sum" or "max" over the kernel.

    Raises:
        ValueError: an unknown `reduction`.

    Example:
        >>> import torch
        >>> Kernel().reduce(torch.ones(2, 3, 5, 5)).shape
        torch.Size([2, 3])
    """

    by_rows: ClassVar[bool] = True
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)

    def reduce(self, scores: Tensor) -> Tensor:
        return _reduced(scores.flatten(2), self.reduction) if scores.dim() > 2 else scores

    def expand(self, mask: Tensor, shape: Shape) -> Tensor:
        return mask.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape).contiguous()


@dataclass(frozen=True)
class Block:
    """Tiles of `height` outputs by `width` inputs, which fast kernels can skip. Narang et al. 2017 (arXiv:1711.02782).

    The weight is read as a matrix (out, in x kernel). At the lower and right edge, where the size is no multiple,
    tiles are smaller; they compete like the others.

    Cost: one number for each tile, and for a layer at a time a copy of its scores with the edges filled up.

    When: kernels that skip whole tiles; it costs more accuracy than `Weight`, the larger the tiles the more.

    Args:
        height: at least 1.
        width: at least 1.
        reduction: "mean", "sum" or "max" over the tile; the paper takes the max.

    Raises:
        ValueError: a size below 1, or an unknown `reduction`.

    Example:
        >>> import torch
        >>> block = Block(height=1, width=2)
        >>> block.reduce(torch.tensor([[1.0, 3.0, 5.0]]))
        tensor([[2., 5.]])
        >>> block.expand(torch.tensor([[True, False]]), (1, 3))
        tensor([[ True,  True, False]])
    """

    height: int = 4
    width: int = 4
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_count("height", self.height, minimum=1)
        check_count("width", self.width, minimum=1)
        check_choice("reduction", self.reduction, REDUCTIONS)

    @property
    def by_rows(self) -> bool:
        """Whether tiles lie within rows."""
        return self.height == 1

    def reduce(self, scores: Tensor) -> Tensor:
        matrix = scores.flatten(1)
        tiles = self._tiles(matrix, -math.inf if self.reduction == "max" else 0.0)
        if self.reduction == "max":
            return tiles.amax(-1)
        total = tiles.sum(-1)
        return (
            total
            if self.reduction == "sum"
            else total / self._tiles(matrix.new_ones(matrix.shape), 0.0).sum(-1)
        )

    def expand(self, mask: Tensor, shape: Shape) -> Tensor:
        full = mask.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)
        return full[: shape[0], : math.prod(shape[1:])].reshape(shape).contiguous()

    def _tiles(self, matrix: Tensor, fill: float) -> Tensor:
        """Cut (out, in) into (tile row, tile column, weight), the edges filled up."""
        num_rows, num_columns = (
            math.ceil(n / k) for n, k in zip(matrix.shape, (self.height, self.width), strict=True)
        )
        padded = matrix.new_full((num_rows * self.height, num_columns * self.width), fill)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        return padded.view(num_rows, self.height, num_columns, self.width).transpose(1, 2).flatten(2)


def _reduced(scores: Tensor, reduction: str) -> Tensor:
    """Reduce the last dim."""
    return (
        scores.amax(-1) if reduction == "max" else scores.sum(-1) if reduction == "sum" else scores.mean(-1)
    )
