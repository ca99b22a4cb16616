"""Layers as matrices: their weights (out, in), and their inputs (positions, in)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.core.types import Name
from lightning_prune.model.activations import owners_of
from lightning_prune.model.layouts import is_transformers_conv1d
from lightning_prune.model.ranks import is_distributed


@dataclass(frozen=True, eq=False)
class Matrix:
    """A layer that multiplies its inputs with a matrix.

    Args:
        module: the layer.
        to_matrix: weight -> (out, in), and other tensors of its shape alike.
        to_weight: (out, in) -> the weight's shape.
        features: input of the layer -> (positions, in).
    """

    module: nn.Module
    to_matrix: Callable[[Tensor], Tensor]
    to_weight: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]


def matrix_of(model: nn.Module, name: Name, parameter: nn.Parameter) -> Matrix:
    """Return the layer that a parameter is the matrix of.

    Raises:
        ValueError: it is not the weight of one linear layer or ungrouped 2d convolution.
    """
    if (found := find_matrix(model, parameter)) is not None:
        return found
    kinds = ", ".join(type(owner).__name__ for owner, _ in owners_of(model, parameter))
    raise ValueError(
        "`solver` solves for linear layers and ungrouped 2d convolutions that hold a weight of their own, but "
        f"`{name}` belongs to {kinds}: exclude it."
    )


def find_matrix(model: nn.Module, parameter: nn.Parameter) -> Matrix | None:
    """Return what `matrix_of` does, or None where the parameter is not such a weight."""
    owners = owners_of(model, parameter)
    module, key = owners[0]
    if len(owners) != 1 or key != "weight":
        return None
    if isinstance(module, nn.Linear):
        return Matrix(module, _same, _same, lambda x: x.flatten(0, -2))
    if is_transformers_conv1d(module):
        return Matrix(module, Tensor.t, Tensor.t, lambda x: x.flatten(0, -2))
    if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros":
        return _convolution(module)
    return None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _convolution(module: nn.Conv2d) -> Matrix:
    """The input channels run fastest along the rows, so that N:M blocks are neighbours."""
    out, num_in, *kernel = module.weight.shape

    def features(x: Tensor) -> Tensor:
        (top, left), same = module.dilation, module.padding == "same"
        if same or isinstance(module.padding, str):
            spare = [d * (k - 1) * same for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            x = F.pad(x, (spare[1] // 2, spare[1] - spare[1] // 2, spare[0] // 2, spare[0] - spare[0] // 2))
            padding: Any = 0
        else:
            padding = module.padding
        patches = F.unfold(x, module.kernel_size, (top, left), padding, module.stride)
        grid = patches.view(len(x), num_in, math.prod(kernel), patches.shape[-1])  # also of no examples
        return grid.permute(0, 3, 2, 1).reshape(-1, grid.shape[2] * num_in)

    def to_matrix(weight: Tensor) -> Tensor:
        return weight.movedim(1, -1).reshape(out, -1)

    def to_weight(matrix: Tensor) -> Tensor:
        return matrix.reshape(out, *kernel, num_in).movedim(-1, 1)

    return Matrix(module, to_matrix, to_weight, features)


class Grams:
    """X X^T of some layers, summed over the forward passes inside of `watch`, in float64.

    Args:
        matrices: of the layers, by name of the weight.
    """

    def __init__(self, matrices: Mapping[Name, Matrix]) -> None:
        self.matrices = dict(matrices)
        self.totals: dict[Name, Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sum up what flows into the layers."""
        with ExitStack() as stack:
            for name, matrix in self.matrices.items():

                def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], name: Name = name) -> None:
                    self._add_(name, args[0] if args else next(iter(kwargs.values())))

                stack.callback(matrix.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @torch.no_grad()
    def _add_(self, name: Name, x: Tensor) -> None:
        features = self.matrices[name].features(x.detach()).float()
        gram = (features.t() @ features).double()
        self.totals[name] = self.totals[name].add_(gram) if name in self.totals else gram

    def read(self, name: Name) -> Tensor:
        """Return the matrix of one layer, over all processes.

        Raises:
            ValueError: nothing flowed into it, or what is no number.
        """
        if name not in self.totals:
            raise ValueError(
                f"`{name}`: nothing flowed through {type(self.matrices[name].module).__name__}.forward. Exclude it."
            )
        total = self.totals.pop(name)
        if is_distributed():
            torch.distributed.all_reduce(total)
        if not bool(total.isfinite().all()):
            raise ValueError(f"`{name}` has inputs that are infinite or NaN on calibration data.")
        return total
