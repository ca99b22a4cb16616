"""A call of a model that can be repeated, on fake tensors or real ones, without leaving a trace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from lightning_prune.graph.fakes import AllFake
from lightning_prune.graph.sandbox import buffers_kept, mode_of_training, plain_kernels, untouched


@dataclass(eq=False)
class Run:
    """A call of a model that is traced and replayed.

    Args:
        model: what is called.
        root: the module of which it is a part, or itself.
        args: its positional arguments, real tensors.
        kwargs: its keyword arguments.
        named: the parameters and buffers to type, by name.
        paths: module -> its path, of all modules.
        training: whether modules are in training mode.
    """

    model: nn.Module
    root: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: Mapping[str, Tensor]
    paths: Mapping[nn.Module, str]
    training: bool = False


@contextmanager
def stage(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, fake: bool, training: bool = False
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Prepare a run that leaves the model as it was, and yield its arguments, fake ones if asked for."""
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(plain_kernels())
        stack.enter_context(mode_of_training(model.modules(), training))
        if training:
            stack.enter_context(buffers_kept(model.modules()))
        convert: Callable[[Tensor], Tensor] = torch.clone
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_quiet(logging.getLogger("torch._subclasses.fake_tensor")))
            stack.enter_context(AllFake(mode))
            convert = mode.from_tensor
        yield tree_map_only(Tensor, convert, (args, dict(kwargs)))


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Hold back what fake tensors say of operations that they cannot do: real ones are tried next."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def tensors_in(value: object, depth: int = 0) -> Iterator[Tensor]:
    """Yield the tensors of a model's output: in containers, dataclasses and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry, depth + 1)
    elif isinstance(value, (tuple, list, set)):
        for entry in value:
            yield from tensors_in(entry, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and depth < 4:
        yield from tensors_in(vars(value), depth + 1)


def plain_name(func: Any) -> str:
    """Return the name of an operation without namespace, overload and the underscore of in-place forms."""
    name: str = func._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
