"""Runs on fake tensors, in which torch works out as little as it can."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class AllFake(TorchDispatchMode):
    """Gives operations fake tensors alone, and says itself what torch finds out slowly.

    Of operations that are given parameters as they are torch remembers no results. A batch norm it takes to pieces,
    which are most of the time that a convolutional network takes.

    Args:
        mode: of the fake tensors.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self.fakes: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # of real tensors, by id, and these, which so live on
        self.real: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; what it hands back of a real tensor, as in-place ones do, is that."""
        kwargs = kwargs or {}
        if func in self.mode.lift_fns:  # numbers of the code, whose values the mode keeps
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_batch_norm.default and not kwargs and _fits(*args):
            return _normalized(*args)
        if not _has_real((*args, *kwargs.values())):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._fake_of, (args, kwargs))
        return tree_map_only(Tensor, lambda tensor: self.real.get(id(tensor), tensor), func(*args, **kwargs))

    def _fake_of(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self.fakes:
            fake = self.mode.from_tensor(tensor)
            self.fakes[id(tensor)], self.real[id(fake)] = (fake, tensor), tensor
        return self.fakes[id(tensor)][0]


def _has_real(values: Iterable[Any]) -> bool:
    """Whether a tensor among some arguments is none of those that are fake."""
    return any(
        _has_real(value)
        if isinstance(value, (tuple, list))
        else isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        for value in values
    )


def _fits(x: Tensor, *others: Any) -> bool:
    """Whether a batch norm's input has as many channels as its vectors have entries; else torch says what is wrong."""
    vectors = [other for other in others if isinstance(other, Tensor)]
    return (
        isinstance(x, FakeTensor)
        and x.dim() > 1
        and all((v.shape, v.dtype) == (x.shape[1:2], x.dtype) for v in vectors)
    )


def _normalized(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a batch norm returns: its output, and its batch's statistics where it is training."""
    size = x.shape[1] if others[4] else 0
    return torch.empty_like(x), x.new_empty(size), x.new_empty(size)
