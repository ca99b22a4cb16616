"""Optimizer steps of what survives: a sparse model is cheaper to train than a dense one, not dearer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.core.types import Masks, Name
from lightning_prune.model.apply import apply_masks_
from lightning_prune.model.reach import is_worth_it

State = dict[str, Any]


@dataclass
class Part:
    """One parameter whose survivors are stepped.

    Args:
        mask: of the parameter; True is kept.
        index: where the survivors lie in the flat parameter, ascending.
        weight: their values while the optimizer steps.
        gradient: that of the weight.
        version: of the parameter when it was last known to be masked, as torch counts the writes to it; -1 is never.
    """

    mask: Tensor
    index: Tensor
    weight: nn.Parameter
    gradient: Tensor
    version: int = -1

    @classmethod
    def of(cls, parameter: nn.Parameter, mask: Tensor) -> Part:
        index = mask.flatten().nonzero().squeeze(1)
        weight = nn.Parameter(parameter.new_empty(len(index)))
        return cls(mask, index, weight, torch.empty_like(weight.detach()))

    def packed(self, value: Any) -> Any:
        """Return a state tensor of the parameter's shape as one of its survivors; all else as it is."""
        is_whole = torch.is_tensor(value) and value.shape == self.mask.shape
        return value.flatten().index_select(0, self.index) if is_whole else value

    def whole(self, value: Any) -> Any:
        """Return a state tensor of the survivors as one of the parameter's shape, zero elsewhere."""
        if not (torch.is_tensor(value) and value.dim() == 1 and len(value) == len(self.index)):
            return value
        return value.new_zeros(self.mask.numel()).index_copy_(0, self.index, value).view(self.mask.shape)


class CompactSteps:
    """Lets an optimizer step the surviving weights alone, as vectors of their own, and keep the state of these alone.

    The model, its gradients and `state_dict()` are what they always are; the optimizer's `state` holds vectors of the
    survivors while this lasts. What is masked is not touched, so it need not be masked again unless someone else has
    written to the parameter, which torch counts.

    Args:
        optimizer: of a class in `reach.ELEMENTWISE`; others are left alone.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parts: dict[nn.Parameter, Part] = {}
        self.is_following = False
        """Whether there are masks to go by; not before `follow`, nor after `release`."""
        self._versions: dict[nn.Parameter, int] = {}
        self._hooks, self._is_behind = ExitStack(), False
        for handle in (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._whole_state_dict),
            optimizer.register_load_state_dict_post_hook(self._pack_loaded),
        ):
            self._hooks.callback(handle.remove)
        _ALL.setdefault(optimizer, []).append(self)

    def follow(self, targets: Mapping[Name, nn.Parameter], masks: Masks) -> None:
        """From now on step what these masks keep, of each parameter where that is worth it; of others all."""
        self.is_following = True
        wanted = {targets[name]: mask for name, mask in masks.items()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                mask = wanted.get(parameter)
                known = self.parts.get(parameter)
                if known is not None and known.mask is not mask:
                    self._release(parameter)
                    known = None
                if known is None and mask is not None and is_worth_it(self.optimizer, group, parameter, mask):
                    self._take(parameter, mask)
        if self.parts and not self._is_behind:
            self._hooks.callback(_register_first(self.optimizer, self._after_step).remove)
            self._is_behind = True

    def restore(self) -> None:
        """Write what was stepped into the parameters, masked, and give them back to the optimizer."""
        stepped = {self.parts[parameter].weight: parameter for parameter in self._versions}
        for group in self.optimizer.param_groups if stepped else ():
            group["params"] = [stepped.get(parameter, parameter) for parameter in group["params"]]
        for weight, parameter in stepped.items():
            part = self.parts[parameter]
            _flat(parameter).index_copy_(0, part.index, weight.detach())
            if self._versions[parameter] != part.version:  # someone else has written to it
                apply_masks_([parameter.detach()], [part.mask])
            part.version = parameter._version
            _move(self.optimizer.state, weight, parameter)
        self._versions = {}

    @property
    def masked(self) -> set[int]:
        """The ids of the parameters that are masked, since nothing has written to them after their last step."""
        return {id(p) for p, part in self.parts.items() if p._version == part.version}

    def release(self) -> None:
        """Give the optimizer its whole state back; `follow` begins anew. Hooks stay: one of them may be running."""
        self.is_following = False
        self.restore()
        for parameter in list(self.parts):
            self._release(parameter)

    def close(self) -> None:
        """Release all, and leave no hook behind."""
        self.release()
        self._hooks.close()
        if (others := _ALL.pop(self.optimizer)) != [self]:
            _ALL[self.optimizer] = [steps for steps in others if steps is not self]

    def _take(self, parameter: nn.Parameter, mask: Tensor) -> None:
        part = self.parts[parameter] = Part.of(parameter, mask)
        _replace(self.optimizer.state.get(parameter, {}), part.packed)

    def _release(self, parameter: nn.Parameter) -> None:
        part = self.parts.pop(parameter)
        _replace(self.optimizer.state.get(parameter, {}), part.whole)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Exchange the parameters once their gradients are there: after the closure, if one computes them."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._exchange()
            return None

        def closed() -> Any:
            loss = closure()
            self._exchange()
            return loss

        return (args[0], closed), {name: value for name, value in kwargs.items() if name != "closure"}

    def _after_step(self, *_: Any) -> None:
        self.restore()

    @torch.no_grad()
    def _exchange(self) -> None:
        self.restore()  # of a step that has raised
        for parameter in list(self.parts):
            if parameter.grad is None:
                continue  # the optimizer passes over it
            if parameter.grad.is_sparse:
                self._release(parameter)
                continue
            part = self.parts[parameter]
            self._versions[parameter] = parameter._version
            torch.index_select(_flat(parameter), 0, part.index, out=part.weight.detach())
            torch.index_select(parameter.grad.reshape(-1), 0, part.index, out=part.gradient)
            part.weight.grad = part.gradient
            _move(self.optimizer.state, parameter, part.weight)
        for group in self.optimizer.param_groups if self._versions else ():
            group["params"] = [self.parts[p].weight if p in self._versions else p for p in group["params"]]

    def _whole_state_dict(self, optimizer: Optimizer, state_dict: State) -> State:
        """Let what is saved be of the parameters' shapes."""
        self.restore()  # of a step that has raised
        number = {p: i for i, p in enumerate(_parameters(optimizer))}
        state = dict(state_dict["state"])
        for parameter, part in self.parts.items():
            if (key := number[parameter]) in state:
                state[key] = {name: part.whole(value) for name, value in state[key].items()}
        return {**state_dict, "state": state}

    def _pack_loaded(self, optimizer: Optimizer) -> None:
        for parameter, part in self.parts.items():
            _replace(optimizer.state.get(parameter, {}), part.packed)


class CompactOptimizers:
    """Compact steps of several optimizers.

    Args:
        optimizers: of none, nothing is done.
    """

    def __init__(self, optimizers: Iterable[Optimizer] = ()) -> None:
        self._steps = {optimizer: CompactSteps(optimizer) for optimizer in optimizers}

    def follow(self, optimizer: Optimizer, targets: Mapping[Name, nn.Parameter], masks: Masks) -> None:
        """Go by masks from the next step on, unless it goes by some already."""
        steps = self._steps.get(optimizer)
        if steps is not None and not steps.is_following:
            steps.follow(targets, masks)

    def masked(self, optimizer: Optimizer) -> set[int]:
        """Return the ids of the parameters that are masked already after a step."""
        return self._steps[optimizer].masked if optimizer in self._steps else set()

    def release(self) -> None:
        """Give all their whole state back."""
        for steps in self._steps.values():
            steps.release()

    def close(self) -> None:
        """Release all, and leave no hook behind."""
        for steps in self._steps.values():
            steps.close()
        self._steps = {}


_ALL: WeakKeyDictionary[Optimizer, list[CompactSteps]] = WeakKeyDictionary()


def release(optimizer: Optimizer) -> None:
    """Give an optimizer its whole state back, for whoever is about to change it."""
    for steps in _ALL.get(optimizer, ()):
        steps.release()


def _register_first(optimizer: Optimizer, hook: Callable[..., Any]) -> RemovableHandle:
    """Register a hook that runs before all others behind a step, which are to find the parameters as they are now."""
    handle = optimizer.register_step_post_hook(hook)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    return handle


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for group in optimizer.param_groups for p in group["params"]))


def _flat(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().view(-1)


def _replace(state: State, change: Callable[[Any], Any]) -> None:
    for key, value in state.items():
        state[key] = change(value)


def _move(state: dict[Any, State], before: nn.Parameter, after: nn.Parameter) -> None:
    if before in state:
        state[after] = state.pop(before)
