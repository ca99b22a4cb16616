"""Runs of a model that leave no trace in it."""

from __future__ import annotations

import random
import sys
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.attention
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
HOOKS = frozenset(name for name in OF_EVERY_MODULE if "hooks" in name)
CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict)


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
    """Put back attributes, hooks and the places of buffers: what a run appends, counts or remembers is gone with it.

    Lists, dicts, sets and deques stay the same objects, shared with whom they are, and get their contents back, and
    generators of random numbers their states. Lazy modules keep what they learn of their sizes.
    """
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in _grown(model)]
    contents: dict[int, tuple[Any, Any]] = {}
    generators: dict[int, Callable[[], Any]] = {}
    for _, attributes, _ in kept:
        for name, value in attributes.items():
            if name not in OF_EVERY_MODULE or name in HOOKS:
                _note_contents(value, contents, generators)
    try:
        yield
    finally:
        for set_back in generators.values():
            set_back()
        for module, attributes, buffers in kept:
            _put_back(vars(module), attributes)
            _put_back(module._buffers, buffers)
        for container, before in contents.values():
            _put_back(container, before)


def _grown(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose attributes are Python's and are not about to change for good."""
    alien = (LazyModuleMixin, torch.jit.ScriptModule)
    return [module for module in model.modules() if not isinstance(module, alien)]


def _note_contents(
    value: Any, noted: dict[int, tuple[Any, Any]], generators: dict[int, Callable[[], Any]]
) -> None:
    """Note what is in a container, and in those within it, and where generators are."""
    if (set_back := _setter(value)) is not None:
        generators.setdefault(id(value), set_back)
    if type(value) not in (*CONTAINERS, tuple) or id(value) in noted:
        return
    if type(value) is not tuple:
        noted[id(value)] = value, copy(value)
    for entry in value.values() if isinstance(value, dict) else value:
        _note_contents(entry, noted, generators)


def _setter(value: Any) -> Callable[[], Any] | None:
    """Return what sets a generator of torch, Python or numpy back to its state; None of anything else."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    return None


def _put_back(container: Any, before: Any) -> None:
    """Give a container its contents back, if it has others."""
    if isinstance(container, dict):
        is_same = len(container) == len(before) and all(
            container.get(k, before) is v for k, v in before.items()
        )
    elif isinstance(container, set):
        is_same = container == before
    else:
        is_same = len(container) == len(before) and all(
            a is b for a, b in zip(container, before, strict=True)
        )
    if not is_same:
        container.clear()
        container.extend(before) if isinstance(container, (list, deque)) else container.update(before)


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


class _Eager:
    """How many want compiled modules to run uncompiled, who may come and go in any order; the first asks torch."""

    num, stance = 0, ExitStack()


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules uncompiled, where this version of torch can."""
    if _Eager.num == 0 and hasattr(torch.compiler, "set_stance"):
        _Eager.stance.enter_context(torch.compiler.set_stance("force_eager"))
    _Eager.num += 1
    try:
        yield
    finally:
        _Eager.num -= 1
        if _Eager.num == 0:
            _Eager.stance.close()


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back buffers and their values: even on fake tensors, a batch norm counts its batches for real."""
    places = [(module, dict(module._buffers)) for module in modules]
    found = [buffer for _, buffers in places for buffer in buffers.values()]
    values = [(buffer, buffer.clone()) for buffer in found if buffer is not None and not buffer.is_meta]
    try:
        yield
    finally:
        for module, buffers in places:
            if not isinstance(module, torch.jit.ScriptModule):  # whose buffers have their places for good
                module._buffers.clear()
                module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def buffers_copied(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules write into copies of their buffers: also what a backward pass reads afterwards stays as it was."""
    found = [
        module for module in modules if module._buffers and not isinstance(module, torch.jit.ScriptModule)
    ]
    places = [(module, dict(module._buffers)) for module in found]
    buffers = {id(b): b for _, own in places for b in own.values() if b is not None}
    copies = {key: buffer.clone() for key, buffer in buffers.items()}
    try:
        for module, own in places:
            module._buffers.update({name: copies.get(id(buffer)) for name, buffer in own.items()})
        yield
    finally:
        for module, own in places:
            module._buffers.clear()
            module._buffers.update(own)


@contextmanager
def mode_of_training(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Set the training flag of modules for a while; each gets its own back."""
    flags = [(module, module.training) for module in modules]
    try:
        for module, _ in flags:
            module.training = training  # not eval(): some override it and merge or swap weights
        yield
    finally:
        for module, flag in flags:
            module.training = flag
