"""How many groups each parameter keeps: exact counts, and the guard against layers that die."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_prune import core
from lightning_prune.core.checks import check_count, check_sparsity
from lightning_prune.core.patterns import listed
from lightning_prune.core.types import Name, shapes_of, some_of

if TYPE_CHECKING:
    from lightning_prune.core.types import Masks, Scores, Shape


def num_kept(size: int, sparsity: float) -> int:
    """Return how many of `size` groups stay, to the nearest whole number.

    Example:
        >>> num_kept(10, 0.9)
        1
    """
    return size - round(size * sparsity)


def check_min_keep(value: object) -> None:
    """Refuse what is neither a count of at least 0 nor a fraction in [0, 1).

    Raises:
        ValueError: a negative number, a fraction of 1 or more, no number at all.
    """
    if isinstance(value, float):
        check_sparsity("min_keep", value)
    else:
        check_count("min_keep", value, minimum=0)


def floor_of(min_keep: int | float, size: int) -> int:
    """Return the number of groups that a parameter of `size` groups keeps at least.

    Example:
        >>> floor_of(1, 50), floor_of(0.01, 50), floor_of(8, 4)
        (1, 1, 4)
    """
    return min(size, math.ceil(size * min_keep) if isinstance(min_keep, float) else min_keep)


def check_floors(shapes: Mapping[Name, Shape], num_keep: int, min_keep: int | float) -> None:
    """Refuse floors that together are more than `num_keep`; otherwise all of them can be kept to.

    Raises:
        ValueError: they are more.
    """
    floors = {name: floor_of(min_keep, math.prod(shape)) for name, shape in shapes.items()}
    if (least := sum(floors.values())) > num_keep:
        raise ValueError(
            f"`min_keep` is at most what the sparsity leaves, {num_keep} groups in all, but got {min_keep!r}, "
            f"which makes {least} groups for {listed(floors)}: take less sparsity, or a smaller one."
        )


def check_has_rows(scope: str, name: Name, shape: Shape) -> None:
    """Refuse scores that have no rows to compare within.

    Raises:
        ValueError: fewer than two dims.
    """
    if len(shape) < 2:
        raise ValueError(
            f"`scope` {scope} compares within rows, of at least two dims, but got scores of shape {shape} for "
            f"`{name}`: its groups are whole slices. Use Local or Global."
        )


def keep_guarded(scores: Scores, num_keep: int, min_keep: int | float) -> Masks:
    """Keep exactly `num_keep` groups over all, the best ones, yet of each parameter at least its floor.

    A parameter that the ranking starves keeps its own best, and the rest compete for what is left; that may starve
    another one, so it is repeated until none is.

    Raises:
        ValueError: the floors together are more than `num_keep`.
    """
    check_floors(shapes_of(scores), num_keep, min_keep)
    masks, floors = core.keep_top(scores, num_keep), dict[Name, int]()
    while starved := _starved(scores, masks, min_keep, floors):
        floors |= starved
        left = num_keep - sum(floors.values())
        masks |= keep_each(scores, starved)
        masks |= core.keep_top(some_of(scores, *(name for name in scores if name not in floors)), left)
    return masks


def keep_each(scores: Scores, counts: Mapping[Name, int]) -> Masks:
    """Keep the best of each parameter by itself, as many as `counts` says."""
    return {name: core.keep_top(some_of(scores, name), count)[name] for name, count in counts.items()}


def _starved(
    scores: Scores, masks: Masks, min_keep: int | float, known: Mapping[Name, int]
) -> dict[Name, int]:
    """Return the floors of the parameters that keep less, but for those `known`."""
    shapes, kept = shapes_of(scores), core.num_kept_of(scores, masks)
    floors = {name: floor_of(min_keep, math.prod(shapes[name])) for name in masks if name not in known}
    return {name: floor for name, floor in floors.items() if kept[name] < floor}


def apportion(shares: Mapping[Name, float], sizes: Mapping[Name, int], total: int) -> dict[Name, int]:
    """Round shares of `total` to whole numbers with that exact sum, by largest remainder; ties to the earlier name.

    Args:
        shares: non-negative real numbers that sum to `total`, none above its size.
        sizes: upper limits.

    Example:
        >>> apportion({"a": 1.4, "b": 2.4, "c": 0.2}, {"a": 5, "b": 5, "c": 5}, 4)
        {'a': 2, 'b': 2, 'c': 0}
    """
    counts = {name: min(math.floor(share + 1e-9), sizes[name]) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    for name in by_remainder * 2:
        if sum(counts.values()) == total:
            break
        counts[name] += counts[name] < sizes[name]
    return counts
