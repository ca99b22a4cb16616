"""Which slices a tool has kept, read off the values; and copies of a small model that are wrong on purpose."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.zoo.masked import Kept


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: t.detach() for name, t in {**parameters, **dict(model.named_buffers())}.items()}


def recover(dense: dict[str, Tensor], small: nn.Module) -> Kept:
    """Return the indices that a small model's tensors keep of the dense ones, found by looking their values up.

    Args:
        dense: copies of the dense model's tensors, whose values are distinct.
        small: the model after pruning.

    Raises:
        ValueError: a tensor has no counterpart, or is no slice of it.
    """
    kept = {}
    for name, tensor in tensors_of(small).items():
        if name not in dense:
            raise ValueError(f"the small model has a tensor `{name}` that the dense one has not.")
        if tensor.shape != dense[name].shape:
            kept[name] = _find_slice(name, dense[name], tensor)
    return kept


def _find_slice(name: str, whole: Tensor, part: Tensor) -> dict[int, tuple[int, ...]]:
    if whole.dim() != part.dim():
        raise ValueError(f"`{name}` has {part.dim()} dims after pruning and {whole.dim()} before.")
    order = whole.flatten().argsort()
    places = order[torch.searchsorted(whole.flatten()[order], part.flatten()).clamp_max(whole.numel() - 1)]
    found = {}
    for dim, along in enumerate(torch.unravel_index(places, whole.shape)):
        if part.shape[dim] != whole.shape[dim]:
            by_slice = along.view(part.shape).movedim(dim, 0).reshape(part.shape[dim], -1)
            found[dim] = tuple(by_slice.mode(dim=1).values.tolist())
    if not torch.equal(take(whole, found), part):
        raise ValueError(f"`{name}` is no slice of the dense tensor.")
    return found


def take(tensor: Tensor, kept: dict[int, tuple[int, ...]]) -> Tensor:
    """Return the kept slices of a tensor."""
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, torch.tensor(indices))
    return tensor


def wrong_slices(
    dense: dict[str, Tensor], small: nn.Module, kept: Kept, num: int = 3
) -> list[tuple[str, int]]:
    """Return `num` matrices and dims, spread over the model, in which an index may be taken from the removed ones."""
    parameters = {name for name, _ in small.named_parameters()}
    places = [
        (name, dim)
        for name, dims in kept.items()
        for dim in dims
        if name in parameters and dense[name].dim() > 1 and 0 < len(dims[dim]) < dense[name].shape[dim]
    ]
    chosen = [places[len(places) * (2 * i + 1) // (2 * num)] for i in range(num)] if places else []
    return list(dict.fromkeys(chosen))


def mistaken(
    whole: Tensor, small: nn.Module, kept: Kept, place: tuple[str, int], index: int | None
) -> nn.Module:
    """Return a copy of a small model in which one index of one tensor is a removed one; with None, as many as can be.

    It is the least that can go wrong: shapes fit, all other tensors agree.
    """
    name, dim = place
    wrong, removed = copy.deepcopy(small), set(range(whole.shape[dim])) - set(kept[name][dim])
    others = {d: i for d, i in kept[name].items() if d != dim}
    indices = list(kept[name][dim])
    if index is None:
        indices[: len(removed)] = sorted(removed)[: len(indices)]
    else:
        indices[index] = min(removed, key=lambda i: abs(i - kept[name][dim][index]))
    with torch.no_grad():
        tensors_of(wrong)[name].copy_(take(whole, others | {dim: tuple(indices)}))
    return wrong
