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
from lightning_prune.graph.replay import as_if
from lightning_prune.graph.run import plain_name, tensors_in
from lightning_prune.graph.sandbox import mode_of_training, plain_kernels, untouched
from lightning_prune.model.survivors import Survivors

TOLERANCE = 1e-10
"""Largest relative difference in float64. Untrained networks are insensitive: 1e-6 would let wrong slices pass."""
OWN_TOLERANCE = 1e-4
"""The same where a model runs in its own precision only."""
LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
Precision = Mapping[torch.dtype, torch.dtype]
WIDE: Precision = dict.fromkeys(LOW_PRECISION, torch.float64) | {torch.complex64: torch.complex128}


def relative_error(
    couplings: Couplings, choice: Choice, plan: Plan, calls: Sequence[Any] = (), *, wide: bool = True
) -> float:
    """Return the largest difference between the masked and the small model's outputs, over the largest output.

    The masked model has zeros for all that goes. Where a mean or a variance runs over pruned channels, as in layer
    norm, it is taken over those that survive.

    Args:
        couplings: of the dense model.
        choice: what is kept.
        plan: what is to be done.
        calls: pairs (args, kwargs) to compare on; by default the traced call.
        wide: whether in float64; some models run in their own precision only.

    Returns:
        The difference, in [0, inf]; 0.0 is equality. Infinity where shapes differ or values are no numbers.
    """
    worst = 0.0
    for args, kwargs in calls or [(couplings.run.args, couplings.run.kwargs)]:
        precision = WIDE if wide else {}
        masked = _outputs(
            couplings, _masked(couplings, choice, precision), {}, args, kwargs, choice, precision
        )
        sliced = _sliced(couplings, plan, precision)
        small = _outputs(couplings, sliced, plan.attributes, args, kwargs, None, precision)
        worst = max(worst, largest_difference(masked, small))
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
            error, wide = _compared(couplings, choice, plan, calls)
            limit = tolerance if wide else max(tolerance, OWN_TOLERANCE)
            if error <= limit:
                return choice, replace(plan, error=error)
            guilty = _first_to_differ(couplings, choice, calls, limit, wide)
            reason = f"the small model would differ from the masked one by {error:.1e}"
        except Unsolvable as unsolvable:
            guilty, reason = list(unsolvable.groups), unsolvable.reason
        couplings.freeze(guilty, reason)
        if freeze is not None:
            freeze(guilty, reason)


def _compared(couplings: Couplings, choice: Choice, plan: Plan, calls: Sequence[Any]) -> tuple[float, bool]:
    """Compare in float64, or where the model's code cannot run in it, in its own precision."""
    try:
        return relative_error(couplings, choice, plan, calls), True
    except Exception:  # a kernel or a cast that knows no float64
        return relative_error(couplings, choice, plan, calls, wide=False), False


def _first_to_differ(
    couplings: Couplings, choice: Choice, calls: Sequence[Any], tolerance: float, wide: bool
) -> list[str]:
    """Find a group with which the models begin to differ, by bisection, and return all groups of its kind."""
    names = [name for name, mask in choice.items() if not bool(mask.all())]
    if not names:
        raise ValueError(
            "`call` gives the same outputs each time, but with nothing removed they differ: a model that draws random "
            "numbers in eval mode cannot be compared with a smaller one."
        )
    low, high = 0, len(names)  # the first `low` groups are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        part = {name: choice[name] for name in names[:middle]}
        try:
            error = relative_error(couplings, part, couplings.plan(part), calls, wide=wide)
            is_equal = error <= tolerance
        except Unsolvable:
            is_equal = False
        low, high = (middle, high) if is_equal else (low, middle)
    culprit = couplings.groups[names[high - 1]]
    return [g.name for g in couplings.groups.values() if (g.kind, g.role) == (culprit.kind, culprit.role)]


def largest_difference(wanted: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference of floating-point tensors, relative to their largest entries; inf for other shapes.

    Example:
        >>> largest_difference([torch.tensor([4.0, 1.0])], [torch.tensor([4.0, 2.0])])
        0.25
    """
    worst = 0.0
    for a, b in zip(wanted, other, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.is_floating_point() and a.numel():
            found = (
                float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) if not torch.equal(a, b) else 0.0
            )
            worst = max(worst, found if found == found else float("inf"))
    return worst


def _masked(couplings: Couplings, choice: Choice, precision: Precision) -> dict[int, Tensor]:
    """Return all tensors in float64, with zeros where something goes."""
    masks = couplings.masks(choice)
    found = {}
    for name, (tensor, _) in couplings.record.tensors.items():
        wide = _converted(tensor.detach(), precision)
        if name in masks:
            wide = wide.masked_fill(~masks[name].to(tensor.device), 0)
        found[id(tensor)] = _like(wide, tensor)
    return found


def _sliced(couplings: Couplings, plan: Plan, precision: Precision) -> dict[int, Tensor]:
    """Return all tensors in float64, sliced and scaled as planned."""
    found = {}
    scales: dict[str, list[Any]] = {}
    for scale in plan.scales:
        scales.setdefault(scale.name, []).append(scale)
    for name, (tensor, _) in couplings.record.tensors.items():
        wide = _converted(tensor.detach(), precision)
        for scale in scales.get(name, []):
            factors = torch.ones(wide.shape[scale.dim], dtype=wide.dtype, device=wide.device)
            factors[list(scale.indices)] = scale.factor
            wide = wide * factors.view([-1 if d == scale.dim else 1 for d in range(wide.dim())])
        for dim, kept in plan.slices.get(name, {}).items():
            wide = wide.index_select(dim, torch.tensor(kept, device=wide.device))
        found[id(tensor)] = _like(wide, tensor)
    return found


def _converted(tensor: Tensor, precision: Precision) -> Tensor:
    return tensor.to(precision.get(tensor.dtype, tensor.dtype))


def _like(tensor: Tensor, original: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor


def _outputs(
    couplings: Couplings,
    tensors: Mapping[int, Tensor],
    attributes: Mapping[str, Mapping[str, Any]],
    args: Any,
    kwargs: Any,
    choice: Choice | None,
    precision: Precision,
) -> list[Tensor]:
    """Run the model with other tensors and return those of its output."""
    run = couplings.run
    args, kwargs = tree_map_only(
        Tensor, lambda t: _converted(t.detach().clone(), precision), (args, dict(kwargs))
    )
    with ExitStack() as stack:
        stack.enter_context(untouched(run.model))
        stack.enter_context(plain_kernels())
        stack.enter_context(mode_of_training(run.model, False))
        if precision:
            stack.enter_context(_default_dtype(torch.float64))
        stack.enter_context(as_if(run.paths, tensors, attributes))
        if precision:
            stack.enter_context(_Wide())  # type: ignore[no-untyped-call]
        if choice is not None:
            stack.enter_context(Survivors(couplings, choice))
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
        kwargs |= {name: WIDE[kwargs[name]] for name in ("dtype", "out_dtype") if kwargs.get(name) in WIDE}
        if plain_name(func) == "_grouped_mm" and args[0].dtype == torch.float64:
            return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped_mm(rows: Tensor, matrices: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Multiply sorted rows (n, k) by the matrices (experts, k, m) of their experts; torch's own takes no float64."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    pieces = [r @ m for r, m in zip(rows.split([*sizes, len(rows) - sum(sizes)])[:-1], matrices, strict=True)]
    return torch.cat([*pieces, rows.new_zeros(len(rows) - sum(sizes), matrices.shape[-1])])
