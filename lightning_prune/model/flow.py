"""The flow through a network that is made positive: SynFlow's gradient, for which no data is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.core.types import Name
from lightning_prune.model.calls import Call, capture_call, map_tensors, replaying, tensors_of
from lightning_prune.model.plain import numbers_of
from lightning_prune.model.targets import NORMS


def flow_gradients(
    model: nn.Module, parameters: Mapping[Name, nn.Parameter], run: Callable[[], Any]
) -> dict[Name, Tensor]:
    """Return dR/d|w| of the summed output R of a network whose weights are |w| and whose input is one everywhere.

    Tanaka et al. 2020, SynFlow (arXiv:2006.05467), algorithm 1. All is computed in float64 and in eval mode.
    Biases, scales and shifts are made positive as well; the means of batch norms count as zero, and other norms only
    scale and shift, since what they divide by would couple the paths. Embeddings give ones, as an input does.

    Args:
        model: any module; it is only read.
        parameters: by name; those that no flow reaches are left out.
        run: runs the model on any batch, of which only the shapes count.

    Returns:
        By name, float64, of the parameters' shapes, divided by the largest of all.

    Raises:
        ValueError: `run` calls no module that has parameters, or the flow exceeds what float64 can hold.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(-4.0), net[1].weight.fill_(2.0)
        >>> found = flow_gradients(net, dict(net.named_parameters()), lambda: net(torch.zeros(1, 1)))
        >>> {name: gradient.item() for name, gradient in found.items()}
        {'0.weight': 0.5, '1.weight': 1.0}
    """
    with capture_call(model) as caught, torch.no_grad():
        run()
    if (call := caught.call) is None:
        raise ValueError("`forward` runs the model, but it called no module that has parameters.")
    positive = {
        name: _positive(name, tensor)
        for name, tensor in [*call.module.named_parameters(), *call.module.named_buffers()]
    }
    names = {id(p): name for name, p in call.module.named_parameters()}
    inside = {name: positive[names[id(p)]] for name, p in parameters.items() if id(p) in names}
    for tensor in inside.values():
        tensor.requires_grad_()
    with replaying(model, call) as again, _linear(call.module), _in_float64(call), torch.enable_grad():
        args, kwargs = _ones((again.args, dict(again.kwargs)), again.batch_size)
        output = functional_call(call.module, positive, args, kwargs)
        total = _summed(output)
        if not total.requires_grad:
            return {}
        found = torch.autograd.grad(total, list(inside.values()), allow_unused=True)
    return _scaled({name: g for name, g in zip(inside, found, strict=True) if g is not None})


def _positive(name: Name, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach()
    found = numbers_of(tensor).detach().double().abs()
    return torch.zeros_like(found) if name.rpartition(".")[2] == "running_mean" else found


def _ones(value: Any, batch_size: int | None) -> Any:
    """Return the arguments of a call for one example, with ones for all numbers that are no indices or masks."""

    def one(tensor: Tensor) -> Tensor:
        found = tensor[:1] if tensor.dim() and tensor.shape[0] == batch_size else tensor
        return torch.ones_like(found, dtype=torch.float64) if found.is_floating_point() else found

    return map_tensors(one, value)


def _summed(output: Any) -> Tensor:
    """Return the sum of all numbers that come out, but for the loss that some models return beside them."""
    found = [tensor.double() for tensor in tensors_of(output) if tensor.is_floating_point()]
    return torch.stack([tensor.sum() for tensor in [t for t in found if t.dim()] or found]).sum()


@contextmanager
def _linear(model: nn.Module) -> Iterator[None]:
    """Let norms other than batch norms with running statistics scale and shift only, and embeddings give ones."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.enter_context(_replaced(module, _embed))
            elif isinstance(module, (*NORMS, nn.GroupNorm)) and not getattr(
                module, "track_running_stats", False
            ):
                stack.enter_context(_replaced(module, _scale_and_shift))
        yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    own = vars(module)
    before = own.get("forward")
    own["forward"] = lambda x, *_, **__: forward(module, x)
    try:
        yield
    finally:
        own.pop("forward") if before is None else own.update(forward=before)


def _embed(module: nn.Module, index: Tensor) -> Tensor:
    assert isinstance(module, nn.Embedding)
    return torch.ones(*index.shape, module.embedding_dim, dtype=torch.float64, device=index.device)


def _scale_and_shift(module: nn.Module, x: Tensor) -> Tensor:
    dims = (1, -1, *[1] * (x.dim() - 2)) if isinstance(module, (_NormBase, nn.GroupNorm)) else None
    for parameter, apply in (
        (getattr(module, "weight", None), torch.mul),
        (getattr(module, "bias", None), torch.add),
    ):
        if parameter is not None:
            x = apply(x, parameter.view(dims) if dims else parameter)
    return x


@contextmanager
def _in_float64(call: Call) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast(call.device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)


def _scaled(found: dict[Name, Tensor]) -> dict[Name, Tensor]:
    if not all(bool(g.isfinite().all()) for g in found.values()):
        raise ValueError(
            "`criterion` sums up all paths through the network, which exceed what float64 can hold."
        )
    largest = max((float(g.max()) for g in found.values()), default=1.0) or 1.0
    return {name: g / largest for name, g in found.items()}
