"""Submodules that are built alike, as copies are: whether their values are equal, near, or have changed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.optim.swa_utils import AveragedModel

from lightning_prune.core.packing import INTEGERS

NUM_COMPARED = 1 << 14
"""Entries of each weight that tell whether two are near."""


def families(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each submodule that others are built like, the paths of all of them; what contains others, first.

    Example:
        >>> families(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(2, 3)))
        {'0': ['0', '2'], '2': ['0', '2']}
    """
    alike: dict[Any, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if path and has_values(module):
            alike[structure(module)].append(path)
    found = {path: paths for paths in alike.values() for path in paths if len(paths) > 1}
    return {path: found[path] for path, _ in model.named_modules() if path in found}


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Return what a copy of a module has in common with it: types of modules, names and shapes of tensors."""
    types = tuple((path, type_before_parametrizations(m)) for path, m in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return types, tuple((name, tuple(tensor.shape)) for name, tensor in tensors)


def has_values(module: nn.Module) -> bool:
    """Whether a module has parameters, and all of them plain ones: not lazy, on meta, quantised or spread."""
    parameters = list(module.parameters())
    return bool(parameters) and all(type(p) is nn.Parameter and not p.is_meta for p in parameters)


def is_layer(module: nn.Module) -> bool:
    """Whether only one module within has parameters of its own, so that others may be built like it by chance."""
    return len([m for m in module.modules() if m._parameters]) == 1


def are_apart(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules share no parameter."""
    return not set(map(id, one.parameters())) & set(map(id, other.parameters()))


def are_equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters have the same values, on whatever devices and of whatever dtypes."""
    return all(torch.equal(a, b.to(a)) for a, b in _pairs(one, other))


@torch.no_grad()
def are_near(one: nn.Module, other: nn.Module) -> bool:
    """Whether the weights of two modules are nearer to each other than to zero, as those of an average are.

    Weights that were drawn or trained apart are not: the square of their distance is the sum of their squares. Norms
    and biases, which all begin with ones and zeros, are left out, and of large weights the first entries tell enough.
    """
    distance = own = 0.0
    for a, b in _pairs(one, other):
        if a.dim() > 1 and a.is_floating_point():
            a, b = (w.detach().flatten()[:NUM_COMPARED].to(a.device, torch.float32) for w in (a, b))
            distance, own = distance + float((a - b).square().sum()), own + float(b.square().sum())
    return distance < own


def is_drawn(module: nn.Module) -> bool:
    """Whether some values of a parameter differ, unlike the ones and zeros that norms begin with."""
    return any(bool((p != p.flatten()[:1]).any()) for p in module.parameters())


def is_averaged(model: nn.Module, path: str) -> bool:
    """Whether a submodule lies in an `AveragedModel` of torch, which is an average for certain."""
    parts = path.split(".")
    above = (".".join(parts[:num]) for num in range(1, len(parts) + 1))
    return any(isinstance(model.get_submodule(name), AveragedModel) for name in above)


def total(module: nn.Module) -> int:
    """Return the sum of the bits of all parameters, as integers: the same on every device."""
    flat = [p.detach().reshape(-1) for p in module.parameters()]
    bits = [values.view(INTEGERS.get(values.element_size(), torch.int64)) for values in flat]
    return sum(int(b.sum(dtype=torch.int64)) * (i + 1) for i, b in enumerate(bits))


def _pairs(one: nn.Module, other: nn.Module) -> zip[tuple[Tensor, Tensor]]:
    return zip(one.parameters(), other.parameters(), strict=True)
