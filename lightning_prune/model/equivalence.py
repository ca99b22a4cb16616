"""Proof that the small model does what the masked one does: both are run in float64 and compared.

Neither is built: the dense model runs twice, once with masked tensors and once with sliced ones standing in for its
own, so that nothing is touched before the proof is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lightning_prune.graph import Choice, Couplings, Plan, Unsolvable
from lightning_prune.graph.projection import mask_of
from lightning_prune.graph.replay import as_if
from lightning_prune.graph.rules import Op
from lightning_prune.graph.sandbox import mode_of_training, plain_kernels, untouched
from lightning_prune.graph.trace import plain_name, tensors_in

TOLERANCE = 1e-10
"""Largest relative difference in float64. Untrained networks are insensitive: 1e-6 would let wrong slices pass."""
LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)


def relative_error(couplings: Couplings, choice: Choice, plan: Plan, calls: Sequence[Any] = ()) -> float:
    """Return the largest difference between the masked and the small model's outputs, over the largest output.

    The masked model has zeros for all that goes. Where a mean or a variance runs over pruned channels, as in layer
    norm, it is taken over those that survive.

    Args:
        couplings: of the dense model.
        choice: what is kept.
        plan: what is to be done.
        calls: pairs (args, kwargs) to compare on; by default the traced call.

    Returns:
        The difference, in [0, inf]; 0.0 is equality. Infinity where shapes differ or values are no numbers.
    """
    worst = 0.0
    for args, kwargs in calls or [(couplings.run.args, couplings.run.kwargs)]:
        masked = _outputs(couplings, _masked(couplings, choice), {}, args, kwargs, choice)
        small = _outputs(couplings, _sliced(couplings, plan), plan.attributes, args, kwargs, None)
        worst = max(worst, _difference(masked, small))
    return worst


def settle(
    couplings: Couplings,
    choose: Callable[[], Choice],
    *,
    calls: Sequence[Any] = (),
    tolerance: float = TOLERANCE,
    freeze: Callable[[Sequence[str], str], None] | None = None,
) -> tuple[Choice, Plan]:
    """Return a choice and its plan that are proved equal; groups that cannot follow are frozen, and it is chosen anew.

    Args:
        couplings: of the dense model.
        choose: returns what is kept among `couplings.groups`.
        calls: pairs (args, kwargs) to compare on.
        tolerance: largest relative difference.
        freeze: called with group names and the reason after they were frozen.

    Example:
        >>> from lightning_prune.graph import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> couplings = trace(net, (torch.ones(2, 4),))
        >>> choice, plan = settle(couplings, lambda: {name: torch.arange(8) < 4 for name in couplings.groups})
        >>> plan.groups, plan.error < 1e-10
        ({'0.weight': (8, 4)}, True)
    """
    while True:
        choice = choose()
        try:
            plan = couplings.plan(choice)
            error = relative_error(couplings, choice, plan, calls)
            if error <= tolerance:
                return choice, replace(plan, error=error)
            guilty = _first_to_differ(couplings, choice, calls, tolerance)
            reason = f"the small model would differ from the masked one by {error:.1e}"
        except Unsolvable as unsolvable:
            guilty, reason = list(unsolvable.groups), unsolvable.reason
        couplings.freeze(guilty, reason)
        if freeze is not None:
            freeze(guilty, reason)


def _first_to_differ(
    couplings: Couplings, choice: Choice, calls: Sequence[Any], tolerance: float
) -> list[str]:
    """Find a group with which the models begin to differ, by bisection, and return all groups of its kind."""
    names = [name for name, mask in choice.items() if not bool(mask.all())]
    low, high = 0, len(names)  # the first `low` groups are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        part = {name: choice[name] for name in names[:middle]}
        try:
            is_equal = relative_error(couplings, part, couplings.plan(part), calls) <= tolerance
        except Unsolvable:
            is_equal = False
        low, high = (middle, high) if is_equal else (low, middle)
    culprit = couplings.groups[names[high - 1]]
    return [g.name for g in couplings.groups.values() if (g.kind, g.role) == (culprit.kind, culprit.role)]


def _difference(masked: list[Tensor], small: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(masked, small, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.is_floating_point() and a.numel():
            found = (
                float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) if not torch.equal(a, b) else 0.0
            )
            worst = max(worst, found if found == found else float("inf"))
    return worst


def _masked(couplings: Couplings, choice: Choice) -> dict[int, Tensor]:
    """Return all tensors in float64, with zeros where something goes."""
    masks = couplings.masks(choice)
    found = {}
    for name, (tensor, _) in couplings.record.tensors.items():
        wide = _wide(tensor.detach())
        if name in masks:
            wide = wide.masked_fill(~masks[name].to(tensor.device), 0)
        found[id(tensor)] = _like(wide, tensor)
    return found


def _sliced(couplings: Couplings, plan: Plan) -> dict[int, Tensor]:
    """Return all tensors in float64, sliced and scaled as planned."""
    found = {}
    scales: dict[str, list[Any]] = {}
    for scale in plan.scales:
        scales.setdefault(scale.name, []).append(scale)
    for name, (tensor, _) in couplings.record.tensors.items():
        wide = _wide(tensor.detach())
        for scale in scales.get(name, []):
            factors = torch.ones(wide.shape[scale.dim], dtype=wide.dtype, device=wide.device)
            factors[list(scale.indices)] = scale.factor
            wide = wide * factors.view([-1 if d == scale.dim else 1 for d in range(wide.dim())])
        for dim, kept in plan.slices.get(name, {}).items():
            wide = wide.index_select(dim, torch.tensor(kept, device=wide.device))
        found[id(tensor)] = _like(wide, tensor)
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype in LOW_PRECISION else tensor


def _like(tensor: Tensor, original: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor


def _outputs(
    couplings: Couplings,
    tensors: Mapping[int, Tensor],
    attributes: Mapping[str, Mapping[str, Any]],
    args: Any,
    kwargs: Any,
    choice: Choice | None,
) -> list[Tensor]:
    """Run the model with other tensors and return those of its output."""
    run = couplings.run
    args, kwargs = tree_map_only(Tensor, lambda t: _wide(t.detach().clone()), (args, dict(kwargs)))
    with ExitStack() as stack:
        stack.enter_context(untouched(run.model))
        stack.enter_context(plain_kernels())
        stack.enter_context(mode_of_training(run.model, False))
        stack.enter_context(_default_dtype(torch.float64))
        stack.enter_context(as_if(run.paths, tensors, attributes))
        stack.enter_context(_Wide())  # type: ignore[no-untyped-call]
        if choice is not None:
            stack.enter_context(_Survivors(couplings, choice))
        return list(tensors_in(run.model(*args, **kwargs)))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Wide(TorchDispatchMode):
    """Turns requests for lower precision, which some models make for their norms, into float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in LOW_PRECISION:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class _Survivors(TorchDispatchMode):
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
    **dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean"), _statistic),
}
