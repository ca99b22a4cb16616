"""Several calls that one step makes, as one: an encoder's and a decoder's, or two of one model on other inputs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten

from lightning_prune.model.calls import (
    Call,
    CallCatcher,
    as_called,
    can_be_repeated,
    capture_call,
    hookable,
    is_redirected,
    num_trained,
)

MAX_ALIKE = 4
"""Calls of one module that are told apart by the shapes of their arguments."""


class Calls(nn.Module):
    """Modules that are called one after the other, each on arguments of its own.

    What one of them gives another is a constant here: it stays whole, as inputs and outputs of a model do.

    Args:
        modules: what is called; some may be the same.

    Shape:
        (args, kwargs, autocast) of each call -> the outputs of each; autocast as in `Call`.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> both = Calls([layer, layer])
        >>> [tuple(y.shape) for y in both(((torch.zeros(5, 2),), {}, None), ((torch.zeros(7, 2),), {}, None))]
        [(5, 3), (7, 3)]
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        different = list(dict.fromkeys(modules))
        self.called = nn.ModuleList(different)
        self.order = tuple(different.index(module) for module in modules)

    @property
    def modules_in_order(self) -> list[nn.Module]:
        """What is called, as often as it is."""
        return [self.called[place] for place in self.order]

    def forward(
        self, *calls: tuple[tuple[Any, ...], Mapping[str, Any], tuple[str, torch.dtype] | None]
    ) -> tuple[Any, ...]:
        """Make all calls."""
        outputs = []
        for module, (args, kwargs, autocast) in zip(self.modules_in_order, calls, strict=True):
            with torch.autocast(*autocast) if autocast else nullcontext():
                outputs.append(module(*args, **kwargs))
        return tuple(outputs)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that are called: several, or itself."""
    return module.modules_in_order if isinstance(module, Calls) else [module]


def joined(parts: Sequence[nn.Module]) -> nn.Module:
    """Return what calls the parts, the other way round."""
    return parts[0] if len(parts) == 1 else Calls(parts)


def as_one(calls: Sequence[Call]) -> Call:
    """Return some calls as one, which makes them all; of these, some may be several already.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> calls = [Call(layer, (torch.zeros(num, 2),), {}) for num in (5, 7)]
        >>> [tuple(y.shape) for y in as_one([as_one(calls), calls[0]])()]
        [(5, 3), (7, 3), (5, 3)]
    """
    single = [part for call in calls for part in _single(call)]
    if len(single) == 1:
        return single[0]
    first = single[0].autocast
    shared = first if all(call.autocast == first for call in single) else None
    args = tuple((c.args, dict(c.kwargs), None if shared else c.autocast) for c in single)
    seen = [call.ran for call in calls if call.ran is not None]
    ran = frozenset[nn.Module]().union(*seen) if len(seen) == len(calls) else None
    is_training = any(call.is_training for call in calls)
    return Call(Calls([call.module for call in single]), args, {}, shared, ran, is_training)


def _single(call: Call) -> list[Call]:
    if not isinstance(call.module, Calls):
        return [call]
    modules = call.module.modules_in_order
    return [
        replace(call, module=module, args=args, kwargs=kwargs, autocast=call.autocast or own)
        for module, (args, kwargs, own) in zip(modules, call.args, strict=True)
    ]


class StepCalls:
    """What a step calls from outside of any other call: modules that are trained, each once for each shape.

    Args:
        largest: has the call of the module with the most trained parameters.
    """

    def __init__(self, largest: CallCatcher) -> None:
        self._largest, self._found = largest, list[_Seen]()

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call that is being made, and whether gradients are asked of it, if none like it was."""
        shape, has_gradients = _shape_of((args, kwargs)), torch.is_grad_enabled()
        alike = [s for s in self._found if s.call.module is module and s.has_gradients == has_gradients]
        if len(alike) < MAX_ALIKE and all(known.shape != shape for known in alike):
            self._found.append(_Seen(as_called(module, args, kwargs), shape, has_gradients))

    @property
    def largest(self) -> Call | None:
        """The call of the module with the most trained parameters."""
        return self._largest.call

    @property
    def call(self) -> Call | None:
        """All calls as one; of a model that is frozen, the largest; None where the step makes none.

        Without gradients are those of a teacher, which is no part of what is trained, but where all are so; and those
        that take another way through what is trained, as where features are kept in a bank.
        """
        found = self._that_count
        if (largest := self.largest) is None or not found:
            return largest
        return as_one([replace(call, ran=largest.ran) for call in found])

    @property
    def _that_count(self) -> list[Call]:
        trained = [seen for seen in self._found if seen.has_gradients]
        shapes = [(seen.call.module, seen.shape) for seen in trained]
        ids = {id(p) for seen in trained for p in seen.call.module.parameters() if p.requires_grad}
        return [
            seen.call
            for seen in self._found
            if seen.has_gradients
            or not trained
            or (_has_any(seen.call.module, ids) and (seen.call.module, seen.shape) not in shapes)
        ]


@dataclass(frozen=True, eq=False)
class _Seen:
    """A call that was seen, what tells it from others of the module, and whether gradients were asked of it."""

    call: Call
    shape: Any
    has_gradients: bool


def _has_any(module: nn.Module, ids: Container[int]) -> bool:
    return any(id(p) in ids for p in module.parameters())


@contextmanager
def capture_step(model: nn.Module) -> Iterator[StepCalls]:
    """Catch the calls of a step that are made from outside of any other, of modules that have trained parameters.

    Args:
        model: any module; hooks are set on it and all its submodules while the context is open.

    Example:
        >>> net = nn.ModuleDict({"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4)})
        >>> with capture_step(net) as caught:
        ...     _ = net["decoder"](net["encoder"](torch.zeros(3, 4)))
        >>> [type(part).__name__ for part in parts_of(caught.call.module)]
        ['Linear', 'Linear']
    """
    running = list[nn.Module]()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_redirected(module):
            return
        if not running and num_trained(module) and can_be_repeated():
            caught.note(module, args, kwargs)
        running.append(module)

    def leave(module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if running and running[-1] is module:
            running.pop()

    with capture_call(model) as largest, ExitStack() as hooks:
        caught = StepCalls(largest)
        for module in hookable(model):
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield caught


def _shape_of(arguments: Any) -> Any:
    leaves, structure = tree_flatten(arguments)
    shapes = [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else _plain(t) for t in leaves]
    return structure, shapes


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else type(value)


def not_called(model: nn.Module, used: Container[str], exempt: Sequence[str] = ()) -> list[str]:
    """Return the paths of modules that are trained and of which a call has used nothing, the outermost ones.

    Single numbers, as weights of losses, fit whatever becomes smaller.

    Args:
        model: the whole model.
        used: the names of the parameters that the call has used.
        exempt: paths below which nothing is looked at.

    Example:
        >>> not_called(nn.ModuleDict({"body": nn.Linear(2, 2), "hard": nn.Linear(2, 2)}), {"body.weight", "body.bias"})
        ['hard']
    """
    found: list[str] = []
    known = {id(p) for name, p in model.named_parameters() if name in used}
    for path, module in model.named_modules():
        names = [(name, p) for name, p in module.named_parameters(prefix=path)]
        names = [(name, p) for name, p in names if p.requires_grad and (is_lazy(p) or p.dim())]
        trained = [
            p for name, p in names if not any(name.startswith(f"{above}.") for above in (*found, *exempt))
        ]
        if path and trained and all(id(p) not in known for p in trained):
            found.append(path)
    return found


def is_all_reached(model: nn.Module, ran: Container[nn.Module]) -> bool:
    """Whether all submodules have run that have trained parameters of their own.

    What is within torch's own modules counts as they do: an attention never calls its output projection.

    Args:
        model: the whole model.
        ran: the modules that have run.

    Example:
        >>> net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2)})
        >>> is_all_reached(net, {net["attention"]}), is_all_reached(net, {*net.values()})
        (False, True)
    """
    return all(_is_reached(child, ran) for child in model.children())


def _is_reached(module: nn.Module, ran: Container[nn.Module]) -> bool:
    is_torch = type(module).__module__.startswith("torch.nn.modules")
    if module in ran and is_torch and not isinstance(module, nn.Sequential):
        return True
    children = list(module.children())
    is_used = module in ran or any(child in ran for child in children)  # by another name than `forward`
    is_list = isinstance(module, (nn.ParameterList, nn.ParameterDict))
    if not is_used and not is_list and any(p.requires_grad for p in module.parameters(recurse=False)):
        return False
    return all(_is_reached(child, ran) for child in children)
