"""What a pruned model has to compute, without asking the engine that pruned it.

The reference is the dense model in float64 whose removed slices are zero. Zeros alone do not make it equal: a mean, a
variance or a softmax over channels would count the removed ones, which the small model no longer has. So these run over
the survivors: all places of an activation but those that the zeroed slices made zero. These are found by running the
dense and the zeroed model side by side with activations that keep the sign of what they see, so that a channel which
happens to be rectified away everywhere is not taken for a removed one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.zoo.example import Example

Kept = Mapping[str, Mapping[int, Sequence[int]]]
"""Parameter or buffer -> dim -> indices that are kept, ascending."""
LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
LINEAR_AT_ZERO = {"relu", "relu_", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "threshold"}
"""Activations that are zero for more than zero; while the removed places are sought, they only shrink."""


class Masked:
    """The reference for one model and one choice of slices.

    Args:
        dense: the model before pruning, with a call of it.
        kept: what remains of it.
    """

    def __init__(self, dense: Example, kept: Kept) -> None:
        self.dense = wide(dense)
        self.zeroed = wide(dense)
        zero_removed_(self.zeroed.model, kept)
        self.patterns = [a & ~b for a, b in zip(self._live(self.dense), self._live(self.zeroed), strict=True)]

    def _live(self, example: Example) -> list[Tensor]:
        with float64(), _Watch() as watch:
            example.outputs()
        return watch.live

    def outputs(self, live_scale: bool = False) -> list[Tensor]:
        """Return what the small model is to compute.

        Args:
            live_scale: take the scale of attention from the width that is left, as a model does that derives it from
                its tensors; by default it stays that of the dense model.
        """
        with float64(), ExitStack() as stack:
            if live_scale:
                stack.enter_context(_LiveScale())
            stack.enter_context(_OverSurvivors(self.patterns))
            return self.zeroed.outputs()


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference relative to the largest value of each output."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
        for a, b in zip(found, expected, strict=True)
    ]
    return max((e if e == e else float("inf") for e in errors), default=float("inf"))


def outputs64(example: Example) -> list[Tensor]:
    """Return the outputs of a model in float64."""
    with float64():
        return wide(example).outputs()


def wide(example: Example) -> Example:
    """Return a copy in float64, its caches emptied."""
    model = copy.deepcopy(example.model).double().train().eval()
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.double() if t.dtype in LOW_PRECISION else t, (example.args, dict(example.kwargs))
    )
    return Example(model, args, kwargs)


@torch.no_grad()
def zero_removed_(model: nn.Module, kept: Kept) -> None:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, dims in kept.items():
        tensor = tensors[name]
        for dim, indices in dims.items() if tensor.is_floating_point() else ():
            removed = torch.ones(tensor.shape[dim], dtype=torch.bool)
            removed[list(indices)] = False
            tensor[(slice(None),) * dim + (removed,)] = 0


@contextmanager
def float64() -> Iterator[None]:
    """Let models compute in float64 throughout, attention as the products that it consists of."""
    before, fastpath = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    torch.set_default_dtype(torch.float64)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            _Float64(),
        ):
            yield
    finally:
        torch.set_default_dtype(before)
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _Float64(TorchDispatchMode):
    """Turns requests for lower precision, which some models make for their norms, into float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in LOW_PRECISION:
            kwargs["dtype"] = torch.float64
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is torch.float64:
            return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped_mm(x: Tensor, weight: Tensor, offs: Tensor, bias: None = None, out_dtype: Any = None) -> Tensor:
    """Multiply each span of rows by a matrix of its own, which torch does in lower precision only."""
    assert x.dim() == 2 and weight.dim() == 3 and bias is None
    spans = zip([0, *offs.tolist()], offs.tolist(), strict=False)
    parts = [x[start:end] @ matrix for (start, end), matrix in zip(spans, weight, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - int(offs[-1]), weight.shape[2])])


class _LiveScale(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            width = int(_nonzero(query, [query.dim() - 1]).sum())
            kwargs["scale"] = max(width, 1) ** -0.5
        return func(*args, **kwargs)


class _Watch(TorchDispatchMode):
    """Notes which indices are not zero throughout, along the dims of every statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if _is_rectifier(name, args):
            return args[0].mul_(0.7) if name.endswith("_") else args[0] * 0.7
        if name in ("hardsigmoid", "hardsigmoid_"):
            return args[0].sigmoid_() if name.endswith("_") else args[0].sigmoid()
        if (found := _statistic(name, args, kwargs or {})) is not None:
            self.live.append(_nonzero(*found))
        return func(*args, **(kwargs or {}))


class _OverSurvivors(TorchDispatchMode):
    """Lets statistics run over what survives; `patterns` are True where something was removed, call by call."""

    def __init__(self, patterns: list[Tensor]) -> None:
        super().__init__()
        self.patterns = list(reversed(patterns))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__.partition(".")[0], kwargs or {}
        found = _statistic(name, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        removed = self.patterns.pop()
        fits = all(r in (1, s) for r, s in zip(removed.shape, found[0].shape, strict=False))
        if not fits or not bool(removed.any()):
            return func(*args, **kwargs)
        return STATISTICS[name](func, (~removed).double(), found[1], args, kwargs)


def _is_rectifier(name: str, args: Any) -> bool:
    clamps = name in ("clamp", "clamp_", "clamp_min", "clamp_min_") and args[1:] == (0,)
    return name in LINEAR_AT_ZERO or (clamps and args[0].is_floating_point())


def _statistic(name: str, args: Any, kwargs: Any) -> tuple[Tensor, list[int]] | None:
    """Return the tensor that a call takes a statistic of, in the shape and along the dims in which it does."""
    if name not in STATISTICS or not args[0].is_floating_point():
        return None
    x = args[0]
    if name in ("native_layer_norm", "_fused_rms_norm"):
        return x, list(range(x.dim() - len(args[1]), x.dim()))
    if name == "native_group_norm":
        _, _, _, num, channels, places, groups, _ = args
        return x.reshape(num, groups, channels // groups, places), [1, 2]
    if name in ("native_batch_norm", "_native_batch_norm_legit"):
        is_training = args[5] if name == "native_batch_norm" else args[-3]
        return (x, [d for d in range(x.dim()) if d != 1]) if is_training else None
    if name == "_softmax":
        return x, [args[1] % x.dim()]
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    given = [given] if isinstance(given, int) and not isinstance(given, bool) else given
    listed = isinstance(given, list | tuple) and len(given) > 0
    return x, sorted({d % x.dim() for d in given}) if listed else list(range(x.dim()))


def _nonzero(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Return where along `dims` together something is not zero, other dims of size 1."""
    others = [d for d in range(x.dim()) if d not in dims]
    return (x != 0).any(dim=others, keepdim=True) if others else x != 0


def _moments(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    shape = [x.shape[d] if d in dims else mask.shape[d] for d in range(x.dim())]
    count = mask.expand(shape).sum(dims, keepdim=True).clamp_min(1)
    mean = (x * mask).sum(dims, keepdim=True) / count
    return mean, (((x - mean) * mask) ** 2).sum(dims, keepdim=True) / count, count


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _layer_norm(func: Any, mask: Tensor, dims: list[int], args: Any, kwargs: Any) -> Any:
    x, shape, weight, bias, eps = args
    mean, variance, _ = _moments(x, mask, dims)
    scale = (variance + eps).rsqrt()
    return _affine((x - mean) * scale * mask, weight, bias, list(shape)), mean, scale


def _rms_norm(func: Any, mask: Tensor, dims: list[int], args: Any, kwargs: Any) -> Any:
    x, shape, weight, eps = args
    scale = (_moments(x**2, mask, dims)[0] + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _affine(x * scale * mask, weight, None, list(shape)), scale


def _group_norm(func: Any, mask: Tensor, dims: list[int], args: Any, kwargs: Any) -> Any:
    x, weight, bias, num, channels, places, groups, eps = args
    grid = x.reshape(num, groups, channels // groups, places)
    mean, variance, _ = _moments(grid, mask, [2, 3])
    scale = (variance + eps).rsqrt()
    y = ((grid - mean) * scale * mask).view(x.shape)
    return _affine(y, weight, bias, [1, -1] + [1] * (x.dim() - 2)), mean.flatten(1), scale.flatten(1)


def _batch_norm(func: Any, mask: Tensor, dims: list[int], args: Any, kwargs: Any) -> Any:
    """Compute what weight standardisation asks of a batch norm in training."""
    x, weight, bias, eps = args[0], args[1], args[2], args[-1]
    mean, variance, _ = _moments(x, mask, dims)
    scale = (variance + eps).rsqrt()
    y = (x - mean) * scale * mask
    return _affine(y, weight, bias, [1, -1] + [1] * (x.dim() - 2)), mean.flatten(), scale.flatten()


def _softmax(func: Any, mask: Tensor, dims: list[int], args: Any, kwargs: Any) -> Any:
    return func(args[0].masked_fill(mask == 0, float("-inf")), *args[1:], **kwargs)


def _moment(func: Any, mask: Tensor, dims: list[int], args: Any, kwargs: Any) -> Any:
    """Compute mean, var, std, var_mean or std_mean."""
    name = func.__name__.partition(".")[0]
    keepdim = kwargs.get("keepdim", args[2] if name == "mean" and len(args) > 2 else False)
    mean, variance, count = _moments(args[0], mask, dims)
    correction = kwargs.get("correction", 1)
    variance = variance * count / (count - (1 if correction is None else correction)).clamp_min(1)
    spread = variance.sqrt() if name.startswith("std") else variance
    mean, spread = (t if keepdim else t.squeeze(dims) for t in (mean, spread))
    return mean if name == "mean" else (spread, mean) if name.endswith("_mean") else spread


STATISTICS: Mapping[str, Any] = {
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), _batch_norm),
    "_softmax": _softmax,
    **dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean"), _moment),
}
