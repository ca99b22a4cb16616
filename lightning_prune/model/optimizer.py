"""What an optimizer holds of pruned weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_map_only

from lightning_prune.core.types import Masks, Name, Shape
from lightning_prune.graph import Plan
from lightning_prune.model.apply import apply_masks_
from lightning_prune.model.compact import release
from lightning_prune.model.shards import local


def parameter_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the ids of all parameters that the optimizers step."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether any parameter that the optimizer steps has a gradient: those of a step that skips its batch have none."""
    return any(True for _ in _gradients(optimizer))


def is_skipped(optimizer: Optimizer) -> bool:
    """Whether a step that is being taken changes nothing, since a scaled gradient is not finite: this waits for it.

    torch calls the steps of optimizers that take the scale off by themselves (fused ones) in any case.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


@contextmanager
def unscaled(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> Iterator[None]:
    """Let gradients be those of the loss itself for as long as the context lasts, also before the optimizer's own step.

    Lightning takes the scale off before its hooks, but of optimizers that do so by themselves (fused ones).
    """
    handles = getattr(optimizer, "_step_supports_amp_scaling", False)
    scale = scaler.get_scale() if scaler is not None and handles else 1.0
    if scale == 1.0:
        yield
        return
    torch._foreach_div_(list(_gradients(optimizer)), scale)
    try:
        yield
    finally:
        torch._foreach_mul_(list(_gradients(optimizer)), scale)


def _gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return (p.grad for p in parameters if p.grad is not None)


def trained_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the ids of the parameters that the optimizers step and that are not frozen."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(p) for group in groups for p in group["params"] if p.requires_grad}


def mask_state_(optimizers: Iterable[Optimizer], targets: Mapping[Name, nn.Parameter], masks: Masks) -> None:
    """Zero what optimizers remember of pruned weights: each state tensor of the weight's shape (momenta, averages).

    LBFGS keeps one flat history of all parameters, which belongs to another subspace now: it starts anew.
    """
    tensors: list[Tensor] = []
    their_masks: list[Tensor] = []
    for optimizer in optimizers:
        release(optimizer)
        if isinstance(optimizer, LBFGS):
            optimizer.state.clear()
            continue
        for name, mask in masks.items():
            for value in optimizer.state.get(targets[name], {}).values():
                if torch.is_tensor(value) and local(value).shape == mask.shape:
                    tensors.append(local(value))
                    their_masks.append(mask)
    apply_masks_(tensors, their_masks)


class _Unfit(Exception):  # noqa: N818
    """A state tensor whose dims are not those of its parameter."""


def cut_state_(
    optimizer: Optimizer, parameters: Mapping[Name, nn.Parameter], plan: Plan, undo: ExitStack
) -> None:
    """Cut what an optimizer remembers of the parameters that a plan cuts.

    State tensors of the parameter's shape are cut as it is; of factored ones, which have size 1 along some dims or lack
    a dim (Adafactor), the dims that are left. What has no such form is forgotten, with a warning, and builds up anew:
    the history of LBFGS, preconditioners, quantized blocks.

    Args:
        optimizer: any.
        parameters: by name, those of the model.
        plan: what is cut.
        undo: gets what would undo it all.
    """
    release(optimizer)
    undo.callback(_put_back_, optimizer, {p: dict(state) for p, state in optimizer.state.items()})
    if isinstance(optimizer, LBFGS):
        _warn(optimizer, "one flat history of all parameters")
        undo.callback(setattr, optimizer, "_numel_cache", optimizer._numel_cache)
        optimizer.state.clear()
        optimizer._numel_cache = None
        return
    for name, dims in plan.slices.items():
        if (parameter := parameters.get(name)) is None or not (state := optimizer.state.get(parameter)):
            continue
        try:
            for key, value in state.items():
                cut = partial(_cut, key=key, shape=plan.shapes[name], dims=dims)
                state[key] = tree_map_only(Tensor, cut, value)
        except _Unfit as unfit:
            _warn(optimizer, f"{unfit} for {name} of shape {plan.shapes[name]}")
            del optimizer.state[parameter]


def _put_back_(optimizer: Optimizer, state: Mapping[Tensor, dict[str, object]]) -> None:
    optimizer.state.clear()
    optimizer.state.update(state)


def _warn(optimizer: Optimizer, what: str) -> None:
    warnings.warn(
        f"{type(optimizer).__name__} remembers {what}, which cannot be cut as the model is: it starts anew.",
        stacklevel=6,
    )


def _cut(value: Tensor, *, key: str, shape: Shape, dims: Mapping[int, tuple[int, ...]]) -> Tensor:
    if value.numel() <= 1 and value.shape != shape:
        return value  # a step count
    places = _places(tuple(value.shape), key, shape)
    cut = value
    for place, dim in enumerate(places):
        if dim in dims and value.shape[place] == shape[dim]:
            cut = cut.index_select(place, torch.tensor(dims[dim], device=value.device))
    return cut


def _places(own: Shape, key: str, shape: Shape) -> list[int]:
    """Return to which dim of the parameter each dim of a state tensor belongs."""
    num_dims = len(shape)
    if len(own) == num_dims and all(a in (1, b) for a, b in zip(own, shape, strict=True)):
        return list(range(num_dims))
    fitting = [lost for lost in range(num_dims) if own == shape[:lost] + shape[lost + 1 :]]
    named = {
        "row": num_dims - 1,
        "col": num_dims - 2,
    }  # a row's mean lacks the last dim, a column's the one before
    wanted = [lost for word, lost in named.items() if word in key]
    chosen = [lost for lost in fitting if not wanted or lost in wanted]
    if len(chosen) != 1:
        raise _Unfit(f"`{key}` of shape {own}")
    return [dim for dim in range(num_dims) if dim != chosen[0]]
