"""Runs of a model that leave no trace in it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
import torch.nn.attention
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back attributes, the places of tensors and generators, whatever a run of the model has changed."""
    kept = [(module, dict(module._parameters)) for module in _grown(model)]
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]), attributes_kept(model):
            yield
    finally:
        random.setstate(state)
        for module, parameters in kept:
            _put_back(module._parameters, parameters)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back attributes and the places of buffers: what a run appends, counts or remembers is gone with it.

    Lazy modules keep what they learn of their sizes.
    """
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in _grown(model)]
    for module, attributes, _ in kept:
        for name, value in attributes.items():
            if type(value) in (dict, list, set) and name not in OF_EVERY_MODULE:
                vars(module)[name] = copy(value)
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            _put_back(vars(module), attributes)
            _put_back(module._buffers, buffers)


def _grown(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not isinstance(module, LazyModuleMixin)]


def _put_back(place: dict[str, Any], before: dict[str, Any]) -> None:
    if len(place) != len(before) or any(
        place.get(name, place) is not value for name, value in before.items()
    ):
        place.clear()
        place.update(before)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Let attention and recurrent layers run as the products they consist of, without gradients, in this thread."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(eager())
        yield


def eager() -> Any:
    """Run compiled modules uncompiled, where this version of torch can."""
    return (
        torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
    )


@contextmanager
def mode_of_training(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the training flag of all modules for a while; each gets its own back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training  # not eval(): some override it and merge or swap weights
        yield
    finally:
        for module, flag in flags:
            module.training = flag
