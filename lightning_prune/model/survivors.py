"""Statistics over what survives: means and variances of the masked model as the small one takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph import Choice, Couplings
from lightning_prune.graph.projection import mask_of
from lightning_prune.graph.rules import Op
from lightning_prune.graph.run import plain_name


class Survivors(TorchDispatchMode):
    """Lets means and variances run over the surviving indices only.

    The k-th call of an operation is the k-th one of the trace, which knows what its dims stand for.
    """

    def __init__(self, couplings: Couplings, choice: Choice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.masks = {couplings.groups[name].atom: mask for name, mask in choice.items()}
        self.queues: dict[str, list[Op]] = {}
        for op in couplings.record.ops:
            if op.name in _OVER_SURVIVORS:
                self.queues.setdefault(op.name, []).append(op)
        for queue in self.queues.values():
            queue.reverse()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = plain_name(func)
        if name in _OVER_SURVIVORS and self.queues.get(name):
            nodes = self.queues[name].pop().inputs[0][1]
            if len(nodes) == args[0].dim():
                masks = [mask_of(node, self.masks).to(args[0].device) for node in nodes]
                if not all(bool(mask.all()) for mask in masks):
                    return _OVER_SURVIVORS[name](func, masks, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _joint(masks: list[Tensor], dims: Sequence[int], like: Tensor) -> Tensor:
    """Return the mask of several dims of a tensor together, as numbers that broadcast against it."""
    joint = torch.ones([1] * like.dim(), dtype=like.dtype, device=like.device)
    for dim in dims:
        joint = joint * masks[dim].to(like.dtype).view([-1 if d == dim else 1 for d in range(like.dim())])
    return joint


def _moments(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, mean square deviation and count over what a mask keeps, with the dims kept."""
    count = mask.expand([x.shape[d] if d in dims else mask.shape[d] for d in range(x.dim())]).sum(
        dims, keepdim=True
    )
    count = count.clamp_min(1)
    mean = (x * mask).sum(dims, keepdim=True) / count
    return mean, (((x - mean) * mask) ** 2).sum(dims, keepdim=True) / count, count


def _layer_norm(func: Any, masks: list[Tensor], args: Any, kwargs: Any) -> Any:
    x, shape, weight, bias, eps = args
    dims = list(range(x.dim() - len(shape), x.dim()))
    mask = _joint(masks, dims, x)
    mean, variance, _ = _moments(x, mask, dims)
    scale = (variance + eps).rsqrt()
    y = (x - mean) * scale * mask
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), mean, scale


def _rms_norm(func: Any, masks: list[Tensor], args: Any, kwargs: Any) -> Any:
    x, shape, weight, eps = args
    dims = list(range(x.dim() - len(shape), x.dim()))
    mask = _joint(masks, dims, x)
    count = mask.sum(dims, keepdim=True).clamp_min(1)
    scale = (
        ((x * mask) ** 2).sum(dims, keepdim=True) / count + (torch.finfo(x.dtype).eps if eps is None else eps)
    ).rsqrt()
    y = x * scale * mask
    return (y if weight is None else y * weight), scale


def _group_norm(func: Any, masks: list[Tensor], args: Any, kwargs: Any) -> Any:
    x, weight, bias, num, channels, places, groups, eps = args
    grid = x.reshape(num, groups, channels // groups, places)
    mask = masks[1].to(x.dtype).view(1, groups, -1, 1)
    mean, variance, _ = _moments(grid, mask.expand(1, groups, channels // groups, places), [2, 3])
    scale = (variance + eps).rsqrt()
    y = ((grid - mean) * scale * mask).view(x.shape)
    along = [1, -1] + [1] * (x.dim() - 2)
    y = y if weight is None else y * weight.view(along)
    return (y if bias is None else y + bias.view(along)), mean.flatten(1), scale.flatten(1)


def _batch_norm(func: Any, masks: list[Tensor], args: Any, kwargs: Any) -> Any:
    """Compute what weight standardisation asks of a batch norm: statistics of weights, over surviving inputs."""
    x, weight, bias, _, _, training, _, eps = args
    if not training:
        return func(*args, **kwargs)
    dims = [d for d in range(x.dim()) if d != 1]
    mask = _joint(masks, dims, x)
    mean, variance, _ = _moments(x, mask, dims)
    scale = (variance + eps).rsqrt()
    y = (x - mean) * scale * mask
    along = [1, -1] + [1] * (x.dim() - 2)
    y = y if weight is None else y * weight.view(along)
    return (y if bias is None else y + bias.view(along)), mean.flatten(), scale.flatten()


def _statistic(func: Any, masks: list[Tensor], args: Any, kwargs: Any) -> Any:
    """Compute mean, var, std, var_mean or std_mean over what survives."""
    name, x = plain_name(func), args[0]
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    listed = [given] if isinstance(given, int) and not isinstance(given, bool) else given
    dims = (
        sorted({d % x.dim() for d in listed})
        if isinstance(listed, (list, tuple)) and listed
        else list(range(x.dim()))
    )
    keepdim = kwargs.get("keepdim", args[2] if name == "mean" and len(args) > 2 else False)
    mean, variance, count = _moments(x, _joint(masks, dims, x), dims)
    correction = kwargs.get("correction", 1)
    variance = variance * count / (count - (1 if correction is None else correction)).clamp_min(1)
    spread = variance.sqrt() if name.startswith("std") else variance
    mean, spread = (t if keepdim else t.squeeze(dims) for t in (mean, spread))
    return mean if name == "mean" else (spread, mean) if name.endswith("_mean") else spread


_OVER_SURVIVORS: Mapping[str, Callable[[Any, list[Tensor], Any, Any], Any]] = {
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    **dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean"), _statistic),
}
