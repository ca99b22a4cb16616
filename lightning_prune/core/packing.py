"""Tensors with many zeros in fewer bytes: one bit for each entry, and the entries that are not zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_prune.core.masks import pack, unpack
from lightning_prune.core.types import Shape

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compress(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries have any bit set, eight to a byte, and those entries in their order.

    It goes by bits, not by values: what comes back is equal bit for bit, minus zero and NaN included.

    Args:
        tensor: of any dtype with entries of 1, 2, 4 or 8 bytes, and any shape.

    Returns:
        Bits (ceil(n / 8),) uint8 and values (number of nonzeros,) of the tensor's dtype.

    Example:
        >>> compress(torch.tensor([[0.0, 1.5], [-0.0, 0.0]]))
        (tensor([6], dtype=torch.uint8), tensor([1.5000, -0.0000]))
    """
    raw = as_integers(tensor)
    is_set = raw != 0
    return pack(is_set)["bits"], raw[is_set].view(tensor.dtype)


def decompress(name: str, bits: Tensor, values: Tensor, shape: Shape) -> Tensor:
    """Return the tensor that `compress` was given.

    Args:
        name: of the tensor, for messages.
        bits: as `compress` returns them.
        values: the same.
        shape: of the tensor.

    Raises:
        ValueError: bits, values and shape do not belong together.

    Example:
        >>> decompress("a", *compress(torch.eye(2)), (2, 2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    is_set = unpack(name, {"shape": [math.prod(shape)], "bits": bits})
    if values.dim() != 1 or int(is_set.sum()) != values.numel():
        raise ValueError(
            f"`{name}`: the values are as many as the bits that are set, {int(is_set.sum())}, but got "
            f"{tuple(values.shape)}."
        )
    raw = torch.zeros(is_set.numel(), dtype=INTEGERS[values.element_size()])
    raw[is_set] = values.view(raw.dtype)
    return raw.view(values.dtype).view(tuple(shape))


def compressed_bytes(tensor: Tensor) -> int:
    """Return how many bytes `compress` makes of a tensor.

    Example:
        >>> compressed_bytes(torch.eye(4))
        18
    """
    return math.ceil(tensor.numel() / 8) + int(as_integers(tensor).count_nonzero()) * tensor.element_size()


def as_integers(tensor: Tensor) -> Tensor:
    """Return the bits of all entries as integers (n,)."""
    if tensor.element_size() not in INTEGERS:
        raise ValueError(f"`dtype` has entries of 1, 2, 4 or 8 bytes, but got {tensor.dtype}.")
    return tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
