"""Make a model physically smaller, as a plan says: all of it, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import LBFGS, Optimizer

from lightning_prune.core.patterns import listed
from lightning_prune.graph import Plan
from lightning_prune.graph.flexible import FlexibleAttention, can_be_flexible, make_flexible_
from lightning_prune.model.skip import skip_


@torch.no_grad()
def execute_(
    model: nn.Module, plan: Plan, *, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()
) -> None:
    """Cut the tensors of a model, set its attributes and replace its modules as a plan says, in place.

    Parameters stay the same objects, so optimizers, parameter groups and hooks keep them; gradients are dropped. What
    optimizers remember in a parameter's shape (momenta, second moments) is cut alike.

    Args:
        model: the dense model that the plan was made for.
        plan: what is to be done.
        optimizers: that step its parameters. LBFGS keeps one flat history: it starts anew, with a warning.
        copies: modules of the same structure, such as averages of the weights.

    Raises:
        ValueError: the model is not the one of the plan. It is then untouched, as after any other error.
    """
    models = [model, *copies]
    for one in models:
        check_fits(one, plan)
    with ExitStack() as undo:
        for one in models:
            _cut_model_(one, plan, undo)
        for optimizer in optimizers:
            _cut_state_(optimizer, model, plan, undo)
        undo.pop_all()


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Refuse a model that a plan was not made for.

    Raises:
        ValueError: tensors, attributes or modules are missing or of another shape.
    """
    tensors = _tensors(model)
    missing = [name for name in plan.slices if name not in tensors]
    if missing:
        raise ValueError(
            f"`plan` cuts tensors of {type(model).__name__}, but got {listed(missing)}, which it does not have: "
            "it belongs to another model."
        )
    for name, shape in plan.shapes.items():
        if name in tensors and tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(
                f"`plan` is for a model in which `{name}` has the shape {tuple(shape)}, but got "
                f"{tuple(tensors[name].shape)}: it belongs to another model, or was carried out already."
            )
    modules = dict(model.named_modules())
    for path, attributes in plan.attributes.items():
        gone = [
            name for name in attributes if path not in modules or not _has(modules[path], name, plan, path)
        ]
        if gone:
            raise ValueError(
                f"`plan` sets {listed(gone)} of `{path}`, which {type(model).__name__} does not have."
            )
    if gone := [path for path in plan.replaced if path not in modules]:
        raise ValueError(f"`plan` replaces {listed(gone)}, which {type(model).__name__} does not have.")


def _has(module: nn.Module, name: str, plan: Plan, path: str) -> bool:
    return hasattr(module, name) or (plan.replaced.get(path) == "attention" and name == "value_dim")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _cut_model_(model: nn.Module, plan: Plan, undo: ExitStack) -> None:
    tensors = _tensors(model)
    for scale in plan.scales:
        _change_(tensors[scale.name], _scaled(tensors[scale.name], scale), undo)
    for name, dims in plan.slices.items():
        _change_(tensors[name], _sliced(tensors[name], dims), undo)
    for path, how in plan.replaced.items():
        _replace_(model, path, how, undo)
    modules = dict(model.named_modules())
    for path, attributes in plan.attributes.items():
        for name, value in attributes.items():
            undo.callback(setattr, modules[path], name, getattr(modules[path], name))
            setattr(modules[path], name, value)
    touched = {name.rpartition(".")[0] for name in plan.slices}
    for path in touched & modules.keys():
        _follow_weights_(modules[path], undo)


def _scaled(tensor: Tensor, scale: Any) -> Tensor:
    factors = torch.ones(tensor.shape[scale.dim], dtype=tensor.dtype, device=tensor.device)
    factors[list(scale.indices)] = scale.factor
    return tensor.detach() * factors.view([-1 if d == scale.dim else 1 for d in range(tensor.dim())])


def _sliced(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    """Return what is kept of a tensor, in its memory format."""
    format_ = torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format
    sliced = tensor.detach()
    for dim, kept in dims.items():
        sliced = sliced.index_select(dim, torch.tensor(kept, dtype=torch.long, device=tensor.device))
    return sliced.contiguous(memory_format=format_)


def _is_channels_last(tensor: Tensor) -> bool:
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return is_last and not tensor.is_contiguous()


def _change_(tensor: Tensor, value: Tensor, undo: ExitStack) -> None:
    undo.callback(setattr, tensor, "data", tensor.data)
    undo.callback(setattr, tensor, "grad", tensor.grad)
    tensor.grad = None
    tensor.data = value


def _replace_(model: nn.Module, path: str, how: str, undo: ExitStack) -> None:
    module = model.get_submodule(path)
    if how.startswith("skip"):
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        undo.callback(setattr, owner, name, module)
        skip_(model, path, int(how.removeprefix("skip") or 0) or None)
    elif can_be_flexible(module):
        undo.callback(setattr, module, "__class__", nn.MultiheadAttention)
        make_flexible_(module)  # type: ignore[arg-type]
    elif not isinstance(module, FlexibleAttention):
        raise ValueError(
            f"`plan` needs `{path}` to be an nn.MultiheadAttention, but got {type(module).__name__}."
        )


def _follow_weights_(module: nn.Module, undo: ExitStack) -> None:
    """Let the sizes that torch's own modules keep follow their weights."""
    for name, value in _sizes_of(module).items():
        if getattr(module, name) != value:
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()


def _sizes_of(module: nn.Module) -> dict[str, Any]:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, _ConvNd):
        i, o = (0, 1) if module.transposed else (1, 0)
        grouped = {i: 1 if module.transposed else module.groups, o: module.groups if module.transposed else 1}
        return {"in_channels": weight.shape[i] * grouped[i], "out_channels": weight.shape[o] * grouped[o]}
    if isinstance(module, nn.Linear):
        return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    if isinstance(module, _NormBase):
        vector: Any = weight if weight is not None else module.running_mean
        return {} if vector is None else {"num_features": vector.shape[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm) and weight is not None:
        return {"num_channels": weight.shape[0]}
    return {}


def _cut_state_(optimizer: Optimizer, model: nn.Module, plan: Plan, undo: ExitStack) -> None:
    """Cut and scale what an optimizer remembers of the parameters that are cut."""
    if isinstance(optimizer, LBFGS):
        undo.callback(optimizer.state.update, dict(optimizer.state))
        optimizer.state.clear()
        warnings.warn(
            "LBFGS starts anew: its history belongs to the model before it became smaller.", stacklevel=4
        )
        return
    parameters = dict(model.named_parameters())
    for name, dims in plan.slices.items():
        state = optimizer.state.get(parameters[name], {}) if name in parameters else {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                cut = _state_cut(value, plan.shapes[name], dims)
                if cut is not value:
                    undo.callback(state.__setitem__, key, value)
                    state[key] = cut


def _state_cut(value: Tensor, shape: Sequence[int], dims: Mapping[int, Sequence[int]]) -> Tensor:
    """Cut a state tensor of the parameter's shape; of factored ones (size 1 in some dims) the dims that are whole."""
    if value.dim() != len(shape) or not value.dim():
        return value
    fitting = {dim: kept for dim, kept in dims.items() if value.shape[dim] == shape[dim]}
    if any(size not in (1, full) for size, full in zip(value.shape, shape, strict=True)) or not fitting:
        return value
    return _sliced(value, fitting)
