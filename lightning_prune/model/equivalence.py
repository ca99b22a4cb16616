"""Proof that the small model does what the masked one does: both are run in float64 and compared.

Neither is built: the dense model runs twice, once with masked tensors and once with sliced ones standing in for its
own, so that nothing is touched before the proof is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_prune.graph import Choice, Couplings, Plan, Unsolvable
from lightning_prune.model.probes import Probe, can_tell, says_something, with_noise
from lightning_prune.model.standins import StandIns

TOLERANCE = 1e-10
"""Largest relative difference in float64. Untrained networks are insensitive: 1e-6 would let wrong slices pass."""
OWN_TOLERANCE = 1e-4
"""The same where a model runs in its own precision only."""

Difference: TypeAlias = Callable[[Probe, bool], tuple[float, bool]]
"""What to compare on, and whether in float64 -> the difference, and whether the masked model says anything there."""


class VacuousProofWarning(UserWarning):
    """Two models were compared, but any two would have been equal."""


def relative_error(
    couplings: Couplings, choice: Choice, plan: Plan, calls: Sequence[Any] = (), *, wide: bool = True
) -> float:
    """Return the largest difference between the masked and the small model's outputs, over the largest output.

    The masked model has zeros for all that goes. Where a mean or a variance runs over pruned channels, as in layer
    norm, it is taken over those that survive. Where the call tells nothing, its inputs all being the same number or
    its outputs zero, they are also compared with noise on the inputs and on parameters that are all the same number.

    Args:
        couplings: of the dense model.
        choice: what is kept.
        plan: what is to be done.
        calls: pairs (args, kwargs) to compare on; by default the traced call.
        wide: whether in float64; some models run in their own precision only.

    Returns:
        The difference, in [0, inf]; 0.0 is equality. Infinity where shapes differ or values are no numbers.
    """
    return largest_error(couplings, partial(_difference, couplings, choice, plan), calls, wide=wide)


def largest_error(
    couplings: Couplings, difference: Difference, calls: Sequence[Any] = (), *, wide: bool = True
) -> float:
    """Return the largest of the differences between two models on some calls, as `relative_error` does."""
    if calls:
        return max(difference(Probe(args, kwargs), wide)[0] for args, kwargs in calls)
    own = Probe(couplings.run.args, couplings.run.kwargs)
    error, tells = difference(own, wide)
    if tells and can_tell(own):
        return error
    try:
        more, tells = difference(with_noise(couplings), wide)
    except Exception:  # a model that takes no other values than its own
        more = 0.0
    if not tells:
        warnings.warn(
            "The smaller model was compared with the masked one, but on the example call no output of floating-point "
            "numbers differs from zero, nor with noise on inputs and constant parameters: that proves nothing. Give "
            "an example whose outputs show what the model computes.",
            VacuousProofWarning,
            stacklevel=2,
        )
    return max(error, more)


def _difference(
    couplings: Couplings, choice: Choice, plan: Plan, probe: Probe, wide: bool
) -> tuple[float, bool]:
    """Return the difference on one call, and whether the masked model says anything there."""
    models = StandIns(couplings, probe.tensors, wide=wide)
    masked = models.masked(choice, probe.args, probe.kwargs)
    try:
        small = models.small(plan, probe.args, probe.kwargs)
    except Exception:  # it goes another way than the call that was traced, as tokens to another expert
        return float("inf"), says_something(masked)
    return largest_difference(masked, small), says_something(masked)


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
        choose: returns what is kept among `couplings.groups`; where it builds small models to measure them, it may find
            that some groups cannot follow.
        calls: pairs (args, kwargs) to compare on.
        tolerance: largest relative difference.
        freeze: called with group names and the reason after they were frozen.

    Example:
        >>> from torch import nn
        >>> from lightning_prune.graph import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> couplings = trace(net, (torch.ones(2, 4),))
        >>> choice, plan = settle(couplings, lambda: {name: torch.arange(8) < 4 for name in couplings.groups})
        >>> plan.groups, plan.error < 1e-10
        ({'0.weight': (8, 4)}, True)
    """
    seen = set[tuple[str, str]]()
    while True:
        try:
            choice = choose()
            plan = couplings.plan(choice)
            error, wide = compared(partial(_difference, couplings, choice, plan), couplings, calls)
            limit = tolerance if wide else max(tolerance, OWN_TOLERANCE)
            if error <= limit:
                return choice, replace(plan, error=error)
            guilty = _first_to_differ(couplings, choice, calls, limit, wide, seen)
            by = f"by {error:.1e}" if error < float("inf") else "in shape or numbers, or fail"
            reason = f"the small model would differ from the masked one {by}"
        except Unsolvable as unsolvable:
            guilty, reason = list(unsolvable.groups), unsolvable.reason
        if not guilty:
            raise ValueError(
                f"`call` runs as it did when it was traced, but with nothing removed it does not: {reason}. Change the "
                "model before it is pruned."
            )
        couplings.freeze(guilty, reason)
        if freeze is not None:
            freeze(guilty, reason)


def compared(difference: Difference, couplings: Couplings, calls: Sequence[Any] = ()) -> tuple[float, bool]:
    """Compare in float64, or where the model's code cannot run in it, in its own precision; say which it was."""
    try:
        return largest_error(couplings, difference, calls), True
    except Exception:  # a kernel or a cast that knows no float64
        return largest_error(couplings, difference, calls, wide=False), False


def _first_to_differ(
    couplings: Couplings,
    choice: Choice,
    calls: Sequence[Any],
    tolerance: float,
    wide: bool,
    seen: set[tuple[str, str]],
) -> list[str]:
    """Find a group with which the models begin to differ, by bisection, and return it with what is as unfit."""
    names = [name for name, mask in choice.items() if not bool(mask.all())]
    if not names:
        raise ValueError(
            "`call` gives the same outputs each time, but with nothing removed they differ: a model that draws random "
            "numbers in eval mode cannot be compared with a smaller one."
        )

    def are_equal(some: Sequence[str]) -> bool:
        part = {name: choice[name] for name in some}
        try:
            return relative_error(couplings, part, couplings.plan(part), calls, wide=wide) <= tolerance
        except Unsolvable:
            return False

    return couplings.unfit_with(names[num_until(names, are_equal) - 1], seen)


def num_until(names: Sequence[str], are_equal: Callable[[Sequence[str]], bool]) -> int:
    """Return of how many names, from the first on, two models are not equal any more, by bisection.

    Args:
        names: at least one; of all of them the models are not equal.
        are_equal: says it of the first names.

    Example:
        >>> num_until(["a", "b", "c", "d"], lambda some: "c" not in some)
        3
    """
    low, high = 0, len(names)  # of the first `low` they are equal, of the first `high` they are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if are_equal(names[:middle]) else (low, middle)
    return high


def largest_difference(wanted: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference of floating-point tensors, relative to their largest entries.

    It is infinite where numbers or shapes of tensors differ.

    Example:
        >>> largest_difference([torch.tensor([4.0, 1.0])], [torch.tensor([4.0, 2.0])])
        0.25
    """
    if len(wanted) != len(other):
        return float("inf")
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
