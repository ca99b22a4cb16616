"""Sparsities by layer from measured curves: what each layer loses when it is pruned by itself."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from lightning_prune.core.allocation import keep_each, num_kept
from lightning_prune.core.checks import check_choice, check_number, check_path, check_sparsity
from lightning_prune.core.directions import MODES
from lightning_prune.core.patterns import check_match, check_patterns, matches
from lightning_prune.core.types import Name, shapes_of

if TYPE_CHECKING:
    from lightning_prune.core.types import Masks, Scores, Shape

Losses = Mapping[float, float]
"""Sparsity -> loss, lower is better; sparsity 0 is the dense model."""


def allocate(
    curves: Mapping[Name, Losses],
    sizes: Mapping[Name, int],
    sparsity: float,
    *,
    largest: float = 0.99,
    mode: str = "min",
) -> dict[Name, float]:
    """Return the sparsities by layer whose losses add up to the least, for a sparsity over all.

    Each layer's curve is taken as its lower convex hull, and sparsity is spent where a weight costs least: the optimum
    of the sum, which is an upper bound of the whole as far as layers suffer by themselves.

    Cost: nothing beside the curves.

    When: sparsities by layer for one-shot pruning of a trained model, by `Fixed` or `sparsity={...}`.

    Args:
        curves: name -> sparsity -> loss or, with `mode="max"`, accuracy, as `sensitivity` returns them.
        sizes: weights of each layer.
        sparsity: over all, in [0, 1).
        largest: in (0, 1]; points of the curves above it are left out, so that no layer passes it.
        mode: "min" where less of the curves is better, as of losses, "max" where more is, as of accuracies.

    Returns:
        Name -> sparsity, as `sparsity=` takes it; weighted by size their mean is `sparsity`.

    Raises:
        ValueError: more sparsity than the curves reach.

    Warns:
        UserWarning: by `mode`, layers become better the more of them is pruned.

    Example:
        >>> curves = {"a": {0.0: 0.0, 0.5: 0.1, 0.9: 1.0}, "b": {0.0: 0.0, 0.5: 2.0, 0.9: 4.0}}
        >>> {name: round(s, 3) for name, s in allocate(curves, {"a": 100, "b": 100}, 0.25).items()}
        {'a': 0.5, 'b': 0.0}
    """
    check_sparsity("sparsity", sparsity)
    losses = as_losses(curves, mode)
    _warn_if_falling(losses, mode)
    within = {name: {s: v for s, v in curve.items() if s <= largest} for name, curve in losses.items()}
    total = sum(sizes.values())
    left, found = sparsity * total, dict.fromkeys(curves, 0.0)
    for name, start, end in _by_price(within, sizes):
        spent = min(end - start, left / sizes[name])
        found[name] += spent
        left -= spent * sizes[name]
    _check_reached(sparsity - left / total, sparsity)
    return found


def as_losses(curves: Mapping[Name, Losses], mode: str) -> dict[Name, dict[float, float]]:
    """Return curves of which less is better."""
    sign = -1.0 if check_choice("mode", mode, MODES) == "max" else 1.0
    return {name: {s: sign * value for s, value in curve.items()} for name, curve in curves.items()}


def _warn_if_falling(losses: Mapping[Name, Losses], mode: str) -> None:
    """Warn where pruning seems to make all layers together better."""
    gains = [curve[min(curve)] - curve[max(curve)] for curve in losses.values() if curve]
    if sum(gains) > 0:
        warnings.warn(
            f"`curves` say that layers become better the more of them is pruned, with mode={mode!r}: of losses less is "
            "better, mode='min', of accuracies more, mode='max'.",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Allocated:
    """Layers share the sparsity out by measured curves, so that what they lose adds up to the least; see `allocate`.

    Li et al. 2016 (arXiv:1608.08710), section 3.2, measure such curves. A layer keeps at least one weight. The number
    kept in all is exact, at every sparsity of a ramp.

    Cost: as for `Local`; the curves are those of `sensitivity`.

    When: a trained model whose layers differ in what they bear, after `sensitivity`, for any sparsity that its curves
        reach.

    Args:
        curves: pattern (`core.patterns`) -> sparsity in [0, 1) -> loss or, with `mode="max"`, accuracy, with the dense
            model's at 0, as `sensitivity` returns them; a parameter takes the first that matches. Or the path of a
            `sensitivity.json`, which says itself what is better.
        mode: "min" where less of the curves is better, "max" where more is; of curves that are given, not of a file.

    Warns:
        UserWarning: by `mode`, layers become better the more of them is pruned.

    Raises:
        ValueError: curves that are none, a file that is no `sensitivity.json`, or (in use) a parameter without a curve,
            a pattern that matches nothing, and more sparsity than the curves reach.

    Example:
        >>> import torch
        >>> scope = Allocated({"robust": {0.0: 1.0, 0.8: 1.1}, "weak": {0.0: 1.0, 0.8: 3.0}})
        >>> masks = scope({"robust": torch.rand(10, 10), "weak": torch.rand(10, 10)}, 0.5)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'robust': 20, 'weak': 80}
    """

    by_rows: ClassVar[bool] = True
    curves: Mapping[str, Losses] | str
    mode: str = "min"

    def __post_init__(self) -> None:
        given = (self.curves, self.mode) if isinstance(self.curves, Mapping) else read_curves(self.curves)
        object.__setattr__(self, "curves", _checked(given[0]))
        object.__setattr__(self, "mode", given[1])
        _warn_if_falling(as_losses(self._known, self.mode), self.mode)

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        self.check(scores, sparsity)
        removed = self._removed(shapes_of(scores), sparsity)
        sizes = {name: math.prod(shape) for name, shape in shapes_of(scores).items()}
        return keep_each(scores, {name: sizes[name] - removed[name] for name in scores})

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse parameters without a curve, patterns that match nothing, and more sparsity than the curves reach."""
        self._removed(shapes_of(scores), sparsity)

    def _removed(self, shapes: Mapping[Name, Shape], sparsity: float) -> dict[Name, int]:
        """Return how many each parameter gives up: whole numbers all along the curves, so that masks are nested."""
        curves = self._by_name(shapes)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        total = sum(sizes.values())
        goal = left = total - num_kept(total, sparsity)
        found = dict.fromkeys(shapes, 0)
        for name, _, end in _by_price(curves, sizes):
            reached = min(round(end * sizes[name]), sizes[name] - 1)
            spent = max(0, min(reached - found[name], left))
            found[name] += spent
            left -= spent
        _check_reached((goal - left) / total if left else sparsity, sparsity)
        return found

    @property
    def _known(self) -> Mapping[str, Losses]:
        return cast("Mapping[str, Losses]", self.curves)

    def _by_name(self, names: Mapping[Name, object]) -> dict[Name, Losses]:
        for pattern in self._known:
            check_match("curves", pattern, names)
        curves = as_losses(self._known, self.mode)
        found = {n: next((c for p, c in curves.items() if matches(p, n)), None) for n in names}
        for name, curve in found.items():
            if curve is None:
                raise ValueError(
                    f"`curves` has one for each parameter that is pruned, but got none for `{name}`."
                )
        return {name: curve for name, curve in found.items() if curve is not None}


def read_curves(path: str) -> tuple[dict[Name, dict[float, float]], str]:
    """Return the curves of a `sensitivity.json`, and "min" or "max", what is better of them.

    Raises:
        ValueError: the file is missing, or is none.
    """
    check_path("curves", path)
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        mode = "min" if known["is_lower_better"] else "max"
        return {name: {float(s): float(v) for s, v in c.items()} for name, c in known["curves"].items()}, mode
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`curves` is a sensitivity.json, but got {path}: {error!r}.") from None


def _checked(curves: Mapping[str, Losses]) -> dict[str, dict[float, float]]:
    if not curves:
        raise ValueError("`curves` has at least one, but got none.")
    check_patterns("curves", curves)
    return {pattern: _checked_curve(f"curves[{pattern!r}]", curve) for pattern, curve in curves.items()}


def _checked_curve(name: str, curve: Losses) -> dict[float, float]:
    if not isinstance(curve, Mapping) or 0 not in curve or len(curve) < 2:
        raise ValueError(f"`{name}` maps 0 and more sparsities to losses, but got {curve!r}.")
    return {check_sparsity(name, s): check_number(f"{name}[{s}]", v, "a loss") for s, v in curve.items()}


def _by_price(
    curves: Mapping[Name, Losses], sizes: Mapping[Name, int]
) -> Iterator[tuple[Name, float, float]]:
    """Go through the pieces of all hulls, where a weight costs least first: name, first and last sparsity."""
    pieces = [
        ((high - low) / ((end - start) * sizes[name]), name, start, end)
        for name, curve in curves.items()
        for (start, low), (end, high) in pairwise(_hull(sorted(curve.items())))
    ]
    for _, name, start, end in sorted(pieces, key=lambda piece: piece[0]):
        yield name, start, end


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of points in ascending order."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _check_reached(reached: float, sparsity: float) -> None:
    if reached < sparsity - 1e-6:
        raise ValueError(
            f"`sparsity` is at most what the curves reach together, {reached:.4f}, but got {sparsity}: "
            "analyse higher sparsities."
        )
