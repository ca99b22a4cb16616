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

OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back attributes, buffers' places and generators, whatever a run of the model (a cache, say) has changed."""
    kept = [
        (module, dict(vars(module)), dict(module._buffers), dict(module._parameters))
        for module in model.modules()
    ]
    for module, attributes, _, _ in kept:
        for name, value in attributes.items():
            if type(value) in (dict, list, set) and name not in OF_EVERY_MODULE:
                vars(module)[name] = copy(value)  # what a run puts in is gone with it
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
        for module, attributes, buffers, parameters in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for place, before in ((module._buffers, buffers), (module._parameters, parameters)):
                place.clear()
                place.update(before)  # type: ignore[arg-type]


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
