"""Where in a layer's weight its inputs and outputs lie.

An activation statistic is one number per feature; a layout turns it into a tensor with the dims of the weight, size 1
where it does not vary, so that a criterion can multiply the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Spread: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """How one weight of one module sees its features.

    Args:
        module: whose forward is watched.
        argument: position and name of the input in that forward.
        feature_dim: of the features in input and output, counted from the end.
        from_input: numbers per input feature -> dims of the weight; None where the inputs are not seen.
        from_output: the same for output features.
    """

    module: nn.Module
    argument: tuple[int, str]
    feature_dim: int
    from_input: Spread | None
    from_output: Spread | None


def layout_of(owner: nn.Module, key: str) -> Layout | None:
    """Return the layout of `owner`'s weight `key`, or None for a layer of unknown kind."""
    if isinstance(owner, nn.Linear):
        return Layout(owner, (0, "input"), -1, _row, _column)
    if isinstance(owner, _ConvNd):
        return _convolution(owner)
    if isinstance(owner, nn.MultiheadAttention):
        return _attention(owner, key)
    if isinstance(owner, nn.Embedding):
        return Layout(owner, (0, "input"), -1, None, _row)
    if is_transformers_conv1d(owner):
        return Layout(
            owner, (0, "x"), -1, _column, _row
        )  # GPT-2's linear layer keeps its weight as (in, out)
    return None


def output_dim(owner: nn.Module) -> int:
    """Return the dim of a module's weight along which its outputs lie.

    Example:
        >>> output_dim(nn.Linear(2, 3)), output_dim(nn.ConvTranspose2d(2, 3, 1)), output_dim(nn.Embedding(9, 3))
        (0, 1, 1)
    """
    return int(isinstance(owner, (_ConvTransposeNd, nn.Embedding)) or is_transformers_conv1d(owner))


def is_transformers_conv1d(owner: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2 in Hugging Face transformers, which is no `nn.Linear`."""
    return type(owner).__name__ == "Conv1D" and type(owner).__module__.startswith("transformers.")


def _row(values: Tensor) -> Tensor:
    return values.view(1, -1)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1)


def _convolution(owner: _ConvNd) -> Layout:
    """(out, in / groups, k, ...), or (in, out / groups, k, ...) where it is transposed."""
    groups, kernel = owner.groups, [1] * len(owner.kernel_size)
    first, second = owner.weight.shape[:2]

    def along_first(values: Tensor) -> Tensor:
        return values.view(first, 1, *kernel)

    def along_second(values: Tensor) -> Tensor:  # each group of dim 0 sees features of its own
        if groups == 1:
            return values.view(1, second, *kernel)
        return values.view(groups, 1, second).expand(-1, first // groups, -1).reshape(first, second, *kernel)

    spreads = (
        (along_first, along_second) if isinstance(owner, _ConvTransposeNd) else (along_second, along_first)
    )
    return Layout(owner, (0, "input"), -1 - len(kernel), *spreads)


def _attention(owner: nn.MultiheadAttention, key: str) -> Layout | None:
    """The projections of query, key and value; what they give is not seen from outside."""
    arguments = {"in_proj_weight": (0, "query"), "q_proj_weight": (0, "query"), "k_proj_weight": (1, "key")}
    arguments["v_proj_weight"] = (2, "value")
    return Layout(owner, arguments[key], -1, _row, None) if key in arguments else None


def find_input(layout: Layout, args: Sequence[object], kwargs: dict[str, object]) -> Tensor | None:
    """Return the tensor that the layout watches among the arguments of a forward."""
    position, name = layout.argument
    found = args[position] if len(args) > position else kwargs.get(name)
    return found if isinstance(found, Tensor) else None
