"""A model with a call of it, its random weights such that a wrong slice shows in the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

MANY = 20_000  # values of a tensor that are told apart by others in the same slice


@dataclass
class Example:
    """A model and the arguments of one call of it."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        return tensors_in(self.model(*self.args, **self.kwargs))


def tensors_in(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output, whatever they are nested in."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for part in output for t in tensors_in(part)] if isinstance(output, list | tuple) else []


@torch.no_grad()
def make_sensitive_(example: Example, seed: int) -> Example:
    """Perturb all weights, so that none is exactly 0 or 1, and let activations have deviation 1.

    Fresh networks hardly depend on most of their weights: layer scales start at 1e-6, gains and biases at 0, and
    activations shrink from layer to layer. A model whose output does not move when a slice is wrong proves nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    model = example.model.eval().requires_grad_(True)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += noise * (0.02 if parameter.dim() > 1 else 0.1)
    seen: set[int] = set()
    hooks = [
        m.register_forward_hook(_condition(m, generator, seen), with_kwargs=True) for m in model.modules()
    ]
    try:
        example.outputs()
    finally:
        for hook in hooks:
            hook.remove()
    statistics = [b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
    for tensor in (*model.parameters(), *statistics):
        if tensor.is_floating_point() and tensor.numel() <= MANY:
            make_distinct_(tensor, generator)
    return example


def make_distinct_(tensor: Tensor, generator: torch.Generator) -> None:
    """Change values that occur more than once, by less than shows, so that each tells its place in the tensor.

    Among 2,048 scales near 1 in float32 there is such a pair more often than not.
    """
    values = tensor.flatten()
    step = 1e-5 * float(values.abs().max())
    while step and len(is_repeated := _repeated(values)):
        values[is_repeated] += step * torch.rand(len(is_repeated), generator=generator).to(values)
    tensor.copy_(values.view(tensor.shape))


def _repeated(values: Tensor) -> Tensor:
    """Return the places of values that are the same as one before them."""
    found, order = values.sort(stable=True)
    return order[1:][found[1:] == found[:-1]]


def _condition(module: nn.Module, generator: torch.Generator, seen: set[int]) -> Callable[..., Any]:
    """Return a hook that sets the scale of a layer at its first call, and lets it run again."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        weight = module._parameters.get("weight")
        if isinstance(module, _BatchNorm) and module.running_var is not None and args[0].dim() > 1:
            _set_statistics_(module, args[0], generator)
        elif _is_linear(module, weight) and isinstance(output, Tensor) and id(weight) not in seen:
            seen.add(id(weight))
            deviation = output.std()
            if not 0 < deviation < float("inf"):
                return None
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter /= deviation
        else:
            return None
        return module.forward(*args, **kwargs)

    return hook


def _is_linear(module: nn.Module, weight: Tensor | None) -> bool:
    """Whether a module multiplies by a matrix: convolutions, linear layers, GPT-2's own."""
    is_matrix = weight is not None and weight.dim() > 1 and weight.is_floating_point()
    return is_matrix and not isinstance(module, nn.Embedding) and not is_parametrized(module)


def _set_statistics_(norm: _BatchNorm, x: Tensor, generator: torch.Generator) -> None:
    dims = [d for d in range(x.dim()) if d != 1]
    spread = x.var(dims, correction=0)
    share = torch.rand(spread.shape, generator=generator)
    norm.running_mean.copy_(x.mean(dims) + 0.1 * share)
    norm.running_var.copy_(spread * (0.5 + share) + 0.1 * spread.mean() + 1e-3)
