"""Tensors of torch's own class, and those of other libraries, as torchao's of 8 bits, which lack most operations."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers itself, one by one, or is a shard of one that does.

    Example:
        >>> is_plain(nn.Linear(2, 3).weight)
        True
    """
    return type(tensor) is Tensor or issubclass(type(tensor), nn.Parameter) or is_sharded(tensor)


def numbers_of(tensor: Tensor) -> Tensor:
    """Return the numbers that a tensor stands for, as a plain one."""
    is_coded = is_traceable_wrapper_subclass(tensor) and not is_plain(tensor)
    return tensor.detach().dequantize() if is_coded else tensor


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor is made of: itself, or codes and scales."""
    if not is_traceable_wrapper_subclass(tensor) or is_plain(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts_of(getattr(tensor, name))
