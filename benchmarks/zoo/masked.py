"""What a pruned model has to compute, without asking the engine that pruned it.

The reference is the dense model in float64 whose removed slices are absent: they are NaN, and whatever is computed from
absent values only is absent too. Element-wise operations do that by themselves. A product sums over the pairs of values
that are both present, which is what zeroed slices would give; means, variances, norms and softmax run over what is
present, as they do in the small model, where zeros would be counted as values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
NAN = float("nan")


def reference(dense: Example, kept: Kept, live_scale: bool = False) -> list[Tensor]:
    """Return what a small model is to compute.

    Args:
        dense: the model before pruning, with a call of it.
        kept: what remains of it.
        live_scale: take the scale of attention from the width that is left, as a model does that derives it from
            its tensors; by default it stays that of the dense model.
    """
    masked = wide(dense)
    make_absent_(masked.model, kept)
    with float64(), ExitStack() as stack:
        if live_scale:
            stack.enter_context(_LiveScale())
        stack.enter_context(_Absent())
        return masked.outputs()


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
def make_absent_(model: nn.Module, kept: Kept) -> None:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, dims in kept.items():
        tensor = tensors[name]
        for dim, indices in dims.items() if tensor.is_floating_point() else ():
            removed = torch.ones(tensor.shape[dim], dtype=torch.bool)
            removed[list(indices)] = False
            tensor[(slice(None),) * dim + (removed,)] = NAN


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
            width = int(_present(query).flatten(0, -2).any(0).sum())
            kwargs["scale"] = max(width, 1) ** -0.5
        return func(*args, **kwargs)


class _Absent(TorchDispatchMode):
    """Lets products and statistics skip what is absent."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__.partition(".")[0], kwargs or {}
        if name in RULES and any(isinstance(a, Tensor) and bool(a.isnan().any()) for a in args):
            return RULES[name](func, *args, **kwargs)
        return func(*args, **kwargs)


def _present(x: Tensor) -> Tensor:
    return ~x.isnan()


def _filled(x: Tensor, value: float = 0.0) -> Tensor:
    return torch.where(x.isnan(), value, x)


def _product(func: Callable[..., Tensor], a: Tensor, b: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """Sum over the pairs that are present; absent where there is none."""
    if a.dtype is not torch.float64:
        return func(a, b, *rest, **kwargs)
    pairs = func(_present(a).double(), _present(b).double(), *rest, **kwargs)
    return func(_filled(a), _filled(b), *rest, **kwargs).masked_fill(pairs < 0.5, NAN)


def _sum_and_product(product: Any) -> Callable[..., Tensor]:
    def rule(func: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return beta * bias + alpha * _product(product, a, b)

    return rule


def _convolution(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    y = _product(lambda a, b: func(a, b, None, *rest), x, weight)
    return y if bias is None else y + bias.view([1, -1] + [1] * (x.dim() - 2))


def _moments(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, mean square deviation and count of what is present along dims, which are kept."""
    present = _present(x)
    count = present.sum(dims, keepdim=True).double()
    mean = _filled(x).sum(dims, keepdim=True) / count  # 0 / 0 is absent
    return mean, torch.where(present, (x - mean) ** 2, 0.0).sum(dims, keepdim=True) / count, count


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _layer_norm(func: Any, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    mean, variance, _ = _moments(x, tuple(range(x.dim() - len(shape), x.dim())))
    scale = (variance + eps).rsqrt()
    return _affine((x - mean) * scale, weight, bias, shape), mean, scale


def _rms_norm(func: Any, x: Tensor, shape: Any, weight: Any, eps: float | None) -> Any:
    square, _, _ = _moments(x**2, tuple(range(x.dim() - len(shape), x.dim())))
    scale = (square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _affine(x * scale, weight, None, shape), scale


def _group_norm(
    func: Any,
    x: Tensor,
    weight: Any,
    bias: Any,
    num: int,
    channels: int,
    places: int,
    groups: int,
    eps: float,
) -> Any:
    grid = x.reshape(num, groups, channels // groups, places)
    mean, variance, _ = _moments(grid, (2, 3))
    scale = (variance + eps).rsqrt()
    y = ((grid - mean) * scale).view(x.shape)
    return _affine(y, weight, bias, [1, -1] + [1] * (x.dim() - 2)), mean.flatten(1), scale.flatten(1)


def _batch_norm(func: Any, x: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
    """Compute also what weight standardisation asks of a batch norm in training."""
    training, _, eps = rest[-3:]
    if not training:
        return func(x, weight, bias, *rest)
    mean, variance, _ = _moments(x, [d for d in range(x.dim()) if d != 1])
    scale = (variance + eps).rsqrt()
    y = _affine((x - mean) * scale, weight, bias, [1, -1] + [1] * (x.dim() - 2))
    return y, mean.flatten(), scale.flatten()


def _dims(x: Tensor, given: Any) -> list[int]:
    if given is None or (isinstance(given, list | tuple) and not given):
        return list(range(x.dim()))
    return sorted(d % x.dim() for d in ([given] if isinstance(given, int) else given))


def _moment(func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Compute sum, mean, var, std, var_mean or std_mean."""
    name, dims = func.__name__.partition(".")[0], _dims(x, dim)
    mean, variance, count = _moments(x, dims)
    correction = kwargs.get("correction", 1)
    variance = variance * count / (count - (1 if correction is None else correction)).clamp_min(1)
    spread = variance.sqrt() if name.startswith("std") else variance
    found = {"sum": (mean * count,), "mean": (mean,)}.get(name, (spread, mean))
    found = tuple(t if keepdim else t.squeeze(dims) for t in found)
    return found if name.endswith("_mean") else found[0]


def _softmax(func: Any, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    return func(_filled(x, -float("inf")), *rest, **kwargs).masked_fill(x.isnan(), NAN)


def _vector_norm(
    func: Any, x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    nothing = _present(x).sum(_dims(x, dim), keepdim=keepdim) == 0
    norm = func(_filled(x), order, dim, keepdim, **kwargs)
    return norm.masked_fill(nothing, NAN)


def _weight_norm(func: Any, direction: Tensor, length: Tensor, dim: int) -> Any:
    weight, norm = func(_filled(direction), _filled(length), dim)
    return weight.masked_fill((direction * length).isnan(), NAN), norm


RULES: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "_grouped_mm"), _product),
    "addmm": _sum_and_product(torch.mm),
    "baddbmm": _sum_and_product(torch.bmm),
    "addmv": _sum_and_product(torch.mv),
    "convolution": _convolution,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), _batch_norm),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("sum", "mean", "var", "std", "var_mean", "std_mean"), _moment),
    "linalg_vector_norm": _vector_norm,
    "_weight_norm_interface": _weight_norm,
}
"""Operation -> what it computes where something is absent; it takes the operation and its arguments."""
