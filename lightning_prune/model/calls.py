"""Example calls: caught from a real batch, and replayed without leaving a trace."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.graph.sandbox import buffers_kept, eager, mode_of_training, untouched


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module that can be replayed: `call()`.

    Args:
        module: what is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        autocast: device type and dtype of the autocast region that it was caught in, or None.
        ran: the modules that ran in the step that it is a part of; None where no step was seen.
        is_training: whether it was seen in training mode, since the step fails or runs less in eval mode.

    Example:
        >>> Call(nn.Linear(2, 3), (torch.zeros(5, 2),), {})().shape
        torch.Size([5, 3])
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: tuple[str, torch.dtype] | None = None
    ran: Set[nn.Module] | None = None
    is_training: bool = False

    def __call__(self) -> Any:
        """Run the module once more."""
        return self.module(*self.args, **self.kwargs)

    @property
    def batch_size(self) -> int | None:
        """The first dim of the first tensor among the arguments, or None where there is none.

        Of a list of images, which detectors take, it is the number of these.
        """
        first = next(iter((*self.args, *self.kwargs.values())), None)
        if isinstance(first, list) and first and all(isinstance(x, Tensor) and x.dim() == 3 for x in first):
            return len(first)
        shapes = (tensor.shape for tensor in tensors_of((self.args, dict(self.kwargs))))
        return next((shape[0] for shape in shapes if shape), None)

    @property
    def device(self) -> torch.device:
        """Where the module's parameters lie."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))


def call_of(model: nn.Module, example: Any) -> Call:
    """Return the call of a model with an example.

    Args:
        model: any module.
        example: its arguments: a tensor, a tuple of positional or a mapping of keyword arguments.

    Example:
        >>> call_of(nn.Linear(2, 3), torch.zeros(5, 2)).batch_size
        5
    """
    if isinstance(example, Mapping):
        return Call(model, (), dict(example))
    return Call(model, example if isinstance(example, tuple) else (example,), {})


class CallCatcher:
    """Where `capture_call` puts the call it has caught."""

    call: Call | None = None


@contextmanager
def capture_call(model: nn.Module) -> Iterator[CallCatcher]:
    """Catch the call that stands for the model: of all modules that run, the one with the most trained parameters.

    LightningModules often call `self.net(x)` and not `self(x)`, so the outermost module that ran is not always the
    model itself. Trained parameters count before frozen ones (a student before its teacher), of equals the first call
    is taken. Its tensors are copied, so that it can be replayed later. What runs inside of a compiled region is not
    seen, and modules without parameters are no model.

    Args:
        model: any module; hooks are set on it and all its submodules while the context is open.

    Yields:
        An object whose `call` is the call, or None where nothing ran.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> with capture_call(net) as caught:
        ...     _ = net(torch.zeros(5, 2))
        >>> caught.call.module is net, caught.call.batch_size
        (True, 5)
    """
    catcher, best, ran = CallCatcher(), (0, 0), set[nn.Module]()

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal best
        if torch.compiler.is_compiling():
            return
        ran.add(module)
        if is_redirected(module) or not can_be_repeated() or (size := _size(module)) <= best:
            return
        best = size
        catcher.call = replace(as_called(module, args, kwargs), ran=ran)

    with ExitStack() as hooks:
        for module in hookable(model):
            handle = module.register_forward_pre_hook(before_forward, with_kwargs=True)
            hooks.callback(handle.remove)
        yield catcher


@contextmanager
def replaying(model: nn.Module, call: Call) -> Iterator[Call]:
    """Let a call be run in eval mode, without gradients, and put everything back: flags, buffers, random states.

    Args:
        model: the module that the call's module is a part of.
        call: what will be run.

    Yields:
        The call with copies of its tensors, on the module's device (those that were caught on the CPU stay there).
    """
    modules = {id(m): m for root in (model, call.module) for m in root.modules()}.values()
    args, kwargs = map_tensors(lambda t: _copy(t, call.device), (call.args, dict(call.kwargs)))
    autocast = torch.autocast(*call.autocast) if call.autocast else nullcontext()
    with (
        mode_of_training(modules, False),
        buffers_kept(modules),
        random_states_kept(call.device),
        eager(),
        _quiet(),
        torch.no_grad(),
        autocast,
    ):
        yield replace(call, args=args, kwargs=kwargs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model be run in eval mode, and put everything back: flags, attributes, buffers, random states."""
    modules = list(model.modules())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with (
        untouched(model),
        buffers_kept(modules),
        random_states_kept(device),
        mode_of_training(modules, False),
        eager(),
    ):
        yield


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Put back the random states of Python, numpy and torch, those of a device too."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back warnings: a replay only repeats what the real batch has said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def hookable(model: nn.Module) -> list[nn.Module]:
    """Return the modules that Python's hooks can be set on."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def as_called(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Return a call that is being made, with copies of its tensors."""
    args, kwargs = map_tensors(lambda t: t.detach().clone(), (args, dict(kwargs)))
    return Call(module, args, kwargs, autocast_of(module))


def can_be_repeated() -> bool:
    """Whether a call that is being made can be made once more with what it is given.

    It cannot be under `torch.func`, whose tensors are no more once their transform is over; and what runs in a backward
    pass, as the blocks of `torch.utils.checkpoint` do, is already a repetition.
    """
    is_backward = torch._C._current_graph_task_id() != -1
    return not is_backward and torch._C._functorch.peek_interpreter_stack() is None


def num_trained(module: nn.Module) -> int:
    """Return the number of a module's parameters that are not frozen."""
    return _size(module)[0]


def autocast_of(module: nn.Module) -> tuple[str, torch.dtype] | None:
    """Return device type and dtype of the autocast region that a module is called in, or None."""
    kind = next((p.device.type for p in module.parameters()), "cpu")
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


def _size(module: nn.Module) -> tuple[int, int]:
    parameters = [p for p in module.parameters() if not is_lazy(p)]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def is_redirected(module: nn.Module) -> bool:
    """Whether `forward` is another function for the moment, as a strategy puts `training_step` in its place."""
    replaced = None if hasattr(module, "_orig_mod") else vars(module).get("forward")
    return replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to(device, copy=True)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value and its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(entry)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return `value` with each tensor in its tuples, lists and dicts replaced; other objects stay as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, entry) for entry in value))
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, entry) for entry in value)
    if type(value) is dict:
        return {key: map_tensors(function, entry) for key, entry in value.items()}
    return value
