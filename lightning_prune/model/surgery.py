"""Make a model physically smaller, as a plan says: all of it, or nothing."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.core.patterns import listed
from lightning_prune.graph import Plan, Scale
from lightning_prune.graph.flexible import FlexibleAttention, can_be_flexible, make_flexible_
from lightning_prune.graph.sizes import sizes_of
from lightning_prune.model.history import note_
from lightning_prune.model.optimizer import cut_state_
from lightning_prune.model.skip import Skip


def execute_(
    model: nn.Module, plan: Plan, *, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()
) -> None:
    """Cut the tensors of a model, set its attributes and replace its modules as a plan says, in place.

    Parameters stay the same objects, so optimizers, parameter groups and hooks keep them; gradients are dropped. What
    optimizers remember in a parameter's shape (momenta, second moments, rows and columns of them) is cut alike. The
    model remembers the plan, and a LightningModule puts it into its checkpoints.

    Args:
        model: the model that the plan was made for.
        plan: what is to be done.
        optimizers: that step its parameters. One whose memory has another form starts anew, with a warning.
        copies: modules of the same structure, such as averages of the weights.

    Raises:
        ValueError: the model is not the one of the plan. It is then untouched, as after any other error.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> execute_(layer, Plan({"weight": {0: (0, 2)}, "bias": {0: (0, 2)}}, {"weight": (3, 2), "bias": (3,)}))
        >>> layer
        Linear(in_features=2, out_features=2, bias=True)
    """
    with ExitStack() as undo:
        carry_out_(model, plan, undo, optimizers=optimizers, copies=copies)
        undo.pop_all()


@torch.no_grad()
def carry_out_(
    model: nn.Module,
    plan: Plan,
    undo: ExitStack,
    *,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> None:
    """Do what `execute_` does, and leave to the caller whether `undo` is run or forgotten."""
    models = [model, *copies]
    for one in models:
        check_fits(one, plan)
    parameters = dict(model.named_parameters())
    for one in models:
        _cut_tensors_(one, plan, undo)
        _adapt_modules_(one, plan, undo)
    for optimizer in optimizers:
        cut_state_(optimizer, parameters, plan, undo)
    for one in models:
        note_(one, plan, undo)


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Refuse a model that a plan was not made for.

    Raises:
        ValueError: tensors, attributes or modules are missing or of another shape or type.
    """
    parameters, tensors, modules = (
        dict(model.named_parameters()),
        _tensors(model),
        dict(model.named_modules()),
    )
    kind, needed = type(model).__name__, {*plan.slices, *(scale.name for scale in plan.scales)}
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(
            f"`plan` cuts tensors of the model, but got {kind}, which has no {listed(sorted(missing))}: the plan "
            "belongs to another model."
        )
    for name, shape in plan.shapes.items():
        if (name in needed or name in parameters) and tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"`plan` is for a model in which {name} has the shape {shape}, but got {kind} with "
                f"{tuple(tensors[name].shape)}: the plan belongs to another model, or was carried out already."
            )
    if gone := [path for path in {**plan.attributes, **plan.replaced} if path not in modules]:
        raise ValueError(f"`plan` changes modules of the model, but got {kind}, which has no {listed(gone)}.")
    for path, how in plan.replaced.items():
        _check_replaced(path, how, modules[path])
    for path, values in plan.attributes.items():
        extra = {"value_dim", "scored_dim"} if plan.replaced.get(path) == "attention" else set()
        if gone := [name for name in values if not hasattr(modules[path], name) and name not in extra]:
            raise ValueError(
                f"`plan` sets attributes that exist, but got {listed(gone)} for {path or kind}, a "
                f"{type(modules[path]).__name__} without."
            )
        for name in values.keys() - extra:
            _check_attribute(f"{path}.{name}", getattr(modules[path], name), values[name])


def _check_attribute(name: str, own: object, value: object) -> None:
    """Refuse to put a value in the place of something else: of a method, or of a submodule."""

    def kind(found: object) -> object:
        return next((k for k in (str, numbers.Real, (tuple, list)) if isinstance(found, k)), type(found))

    if kind(own) != kind(value):
        raise ValueError(
            f"`plan` sets plain attributes to values of their kind, but got {value!r} for {name}, which is of type "
            f"{type(own).__name__}."
        )


def _check_replaced(path: str, how: str, module: nn.Module) -> None:
    if how == "attention" and not (can_be_flexible(module) or isinstance(module, FlexibleAttention)):
        raise ValueError(
            f"`plan` frees the widths of an nn.MultiheadAttention, but got {type(module).__name__} for {path}."
        )
    if how != "attention" and not path:
        raise ValueError("`plan` skips blocks of a model, but got the model itself.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _cut_tensors_(model: nn.Module, plan: Plan, undo: ExitStack) -> None:
    tensors = _tensors(model)
    new = {name: tensors[name].detach() for name in [*plan.slices, *(scale.name for scale in plan.scales)]}
    for scale in plan.scales:
        new[scale.name] = scaled(new[scale.name], scale)
    for name, dims in plan.slices.items():
        new[name] = sliced(new[name], dims)
    for name, value in new.items():
        undo.callback(_set_, tensors[name], tensors[name].data, tensors[name].grad)
        _set_(tensors[name], value, None)


def scaled(tensor: Tensor, scale: Scale) -> Tensor:
    """Return a tensor of which some slices are multiplied."""
    factors = torch.ones(tensor.shape[scale.dim], dtype=tensor.dtype, device=tensor.device)
    factors[list(scale.indices)] = scale.factor
    return tensor * factors.view([-1 if d == scale.dim else 1 for d in range(tensor.dim())])


def sliced(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    """Return what is kept of a tensor, in the same memory format."""
    cut = tensor
    for dim, kept in dims.items():
        cut = cut.index_select(dim, torch.tensor(kept, dtype=torch.long, device=tensor.device))
    for format_, num_dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if (
            tensor.dim() == num_dims
            and tensor.is_contiguous(memory_format=format_)
            and not tensor.is_contiguous()
        ):
            return cut.contiguous(memory_format=format_)
    return cut.contiguous()


def _set_(tensor: Tensor, value: Tensor, grad: Tensor | None) -> None:
    """Give a tensor other data, of whatever shape.

    The first assignment, of another dtype, makes autograd forget the node that accumulates its gradient: one that is
    held by a living graph, or by DistributedDataParallel, would go on to expect the old shape.
    """
    tensor.grad = None
    if tensor.requires_grad:
        tensor.data = value.new_empty(
            0, dtype=torch.float32 if value.dtype == torch.float64 else torch.float64
        )
    tensor.data = value
    tensor.grad = grad


def _adapt_modules_(model: nn.Module, plan: Plan, undo: ExitStack) -> None:
    """Make attentions flexible, set attributes, let sizes follow weights, and skip blocks, in this order."""
    modules = dict(model.named_modules())
    touched = {path: modules[path] for name in plan.slices if (path := name.rpartition(".")[0]) in modules}
    changed = {**touched, **{path: modules[path] for path in [*plan.attributes, *plan.replaced]}}
    for module in changed.values():
        undo.callback(_put_back_, module, type(module), dict(vars(module)))
    for path, module in changed.items():
        if can_be_flexible(module) and (path in touched or plan.replaced.get(path) == "attention"):
            make_flexible_(module)
        for name, value in plan.attributes.get(path, {}).items():
            setattr(module, name, value)
    for module in touched.values():
        for name, value in sizes_of(module).items():
            setattr(module, name, value)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    for path, how in plan.replaced.items():
        if how != "attention":
            replace_(model, path, how, undo)


def _put_back_(module: nn.Module, kind: type[nn.Module], attributes: Mapping[str, object]) -> None:
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(attributes)


def replace_(model: nn.Module, path: str, how: str, undo: ExitStack) -> None:
    """Put a `Skip` in the place of a block, in the words of `Plan.replaced`."""
    parent, _, name = path.rpartition(".")
    owner, block = model.get_submodule(parent), model.get_submodule(path)
    undo.callback(setattr, owner, name, block)
    setattr(owner, name, Skip(how, block).train(block.training))
