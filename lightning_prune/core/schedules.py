"""Along which curve: progress through the window, in [0, 1] -> fraction of the target reached, in [0, 1].

A schedule knows nothing of sparsities or steps: `0.9 * schedule(progress)` is the sparsity, and the window says
what the progress is. Every schedule ends at 1.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from lightning_prune.core.checks import check_count, check_fraction, check_number, check_positive
from lightning_prune.core.types import Schedule


@dataclass(frozen=True)
class Constant:
    """One-shot: f(p) = 1, all of the target at the first update.

    Cost: as for `Linear`; with a window that ends where it begins, a single one.

    When: one-shot pruning in a training, sparse training, and maskings at one sparsity from the first step on.

    Example:
        >>> Constant()(0.0)
        1.0
    """

    def __call__(self, progress: float) -> float:
        check_fraction("progress", progress)
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Equal steps: f(p) = p.

    Cost: one selection at each update of the window.

    When: a plain curve to compare with; `Polynomial` leaves more time at high sparsity.

    Example:
        >>> Linear()(0.25)
        0.25
    """

    def __call__(self, progress: float) -> float:
        return check_fraction("progress", progress)


@dataclass(frozen=True)
class Polynomial:
    """Gradual pruning: f(p) = 1 - (1 - p)^power, fast while there is much to spare and slow at the end.

    Zhu & Gupta 2017 (arXiv:1710.01878), eq. 1, with an initial sparsity of 0.

    Cost: as for `Linear`.

    When: first: pruning in training at any sparsity.

    Args:
        power: above 0; 3 is the paper's cubic, 1 is linear, a larger one prunes earlier.

    Raises:
        ValueError: `power` is not above 0.

    Example:
        >>> [Polynomial()(p) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.875, 1.0]
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        check_positive("power", self.power)

    def __call__(self, progress: float) -> float:
        return 1.0 - float((1.0 - check_fraction("progress", progress)) ** self.power)


@dataclass(frozen=True)
class Cosine:
    """Slow, fast, slow: f(p) = (1 - cos(pi p)) / 2.

    Cost: as for `Linear`.

    When: both ends are to be gentle; also how fast the `drop_fraction` of `SparseTraining` falls.

    Example:
        >>> [round(Cosine()(p), 3) for p in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.146, 0.5, 1.0]
    """

    def __call__(self, progress: float) -> float:
        return 0.5 * (1.0 - math.cos(math.pi * check_fraction("progress", progress)))


@dataclass(frozen=True)
class Exponential:
    """Saturating: f(p) = (1 - exp(-steepness p)) / (1 - exp(-steepness)).

    Cost: as for `Linear`.

    When: density is to fall by the same factor at each update, at a steepness of -log(1 - sparsity); below 0 for a late
        ramp.

    Args:
        steepness: not 0; above 0 prunes early (5 reaches 92 % of the target half-way), below 0 prunes late.

    Raises:
        ValueError: `steepness` is 0 (use `Linear`) or so large that exp overflows.

    Example:
        >>> [round(Exponential()(p), 3) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.924, 1.0]
    """

    steepness: float = 5.0

    def __post_init__(self) -> None:
        if not 0.0 < abs(check_number("steepness", self.steepness)) <= 100.0:
            raise ValueError(
                f"`steepness` is a number in [-100, 100] other than 0, but got {self.steepness!r}."
            )

    def __call__(self, progress: float) -> float:
        return math.expm1(-self.steepness * check_fraction("progress", progress)) / math.expm1(
            -self.steepness
        )


@dataclass(frozen=True)
class OneCycle:
    """One-cycle pruning, a logistic ramp that spends most of the run at low or at high sparsity.

    f(p) = g(p) - g(0) over g(1) - g(0), with g(p) = 1 / (1 + exp(-alpha p + beta)); Hubens et al. 2021
    (arXiv:2107.02086), eq. 3, rescaled so that it starts at 0 and ends at 1 exactly.

    Cost: as for `Linear`.

    When: one short training, in which neither the dense network nor fine-tuning has a phase of its own.

    Args:
        alpha: steepness, above 0; 14 in the paper.
        beta: where the middle lies, p = beta / alpha; 5 in the paper.

    Raises:
        ValueError: `alpha` is not in (0, 100], or `beta` is not in [-100, 100].

    Example:
        >>> [round(OneCycle()(p), 3) for p in (0.0, 0.2, 0.5, 1.0)]
        [0.0, 0.094, 0.88, 1.0]
    """

    alpha: float = 14.0
    beta: float = 5.0

    def __post_init__(self) -> None:
        if not 0.0 < check_number("alpha", self.alpha) <= 100.0:
            raise ValueError(f"`alpha` is a number in (0, 100], but got {self.alpha!r}.")
        if not abs(check_number("beta", self.beta)) <= 100.0:
            raise ValueError(f"`beta` is a number in [-100, 100], but got {self.beta!r}.")

    def __call__(self, progress: float) -> float:
        start, here, end = (self._logistic(p) for p in (0.0, check_fraction("progress", progress), 1.0))
        return (here - start) / (end - start)

    def _logistic(self, progress: float) -> float:
        return 1.0 / (1.0 + math.exp(self.beta - self.alpha * progress))


@dataclass(frozen=True)
class Steps:
    """Iterative pruning: `num_steps` equal jumps, the first at once and the last at the end.

    f(p) = (1 + floor(p (num_steps - 1))) / num_steps; Han et al. 2015 (arXiv:1506.02626) prune and retrain so.

    Cost: as for `Linear`, between the jumps too.

    When: a network is to train on between the jumps; above 95 % `Polynomial` was ahead in our benchmarks.

    Args:
        num_steps: at least 1; 1 is one-shot.

    Raises:
        ValueError: `num_steps` is no whole number of at least 1.

    Example:
        >>> [Steps(num_steps=4)(p) for p in (0.0, 0.3, 0.34, 1.0)]
        [0.25, 0.25, 0.5, 1.0]
    """

    num_steps: int = 5

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, minimum=1)

    def __call__(self, progress: float) -> float:
        done = math.floor(check_fraction("progress", progress) * (self.num_steps - 1) + 1e-9)
        return (1 + done) / self.num_steps


@dataclass(frozen=True)
class Alternating:
    """AC/DC: sparse and dense phases of equal length in turn, the last one sparse.

    f(p) = 1 in sparse phases, 0 in dense ones, so that weights which were pruned by mistake come back;
    Peste et al. 2021 (arXiv:2106.12379), algorithm 1. With an even number of phases the first is dense.

    Cost: one selection at each update of a sparse phase; dense phases step all weights.

    When: weights that were pruned by mistake are to come back; above 90 % `Polynomial` was ahead in our benchmarks.

    Args:
        num_phases: at least 1.

    Raises:
        ValueError: `num_phases` is no whole number of at least 1.

    Example:
        >>> [Alternating(num_phases=4)(p) for p in (0.0, 0.3, 0.6, 0.9, 1.0)]
        [0.0, 1.0, 0.0, 1.0, 1.0]
    """

    num_phases: int = 6

    def __post_init__(self) -> None:
        check_count("num_phases", self.num_phases, minimum=1)

    def __call__(self, progress: float) -> float:
        phase = min(
            math.floor(check_fraction("progress", progress) * self.num_phases + 1e-9), self.num_phases - 1
        )
        return 1.0 if (self.num_phases - 1 - phase) % 2 == 0 else 0.0


@dataclass(frozen=True)
class Join:
    """Several schedules one after the other, each stretched over its share of the progress and of the target.

    With k schedules, boundaries b_1 < ... < b_{k-1} in (0, 1) and levels l_1, ..., l_{k-1} in [0, 1], schedule i
    runs from b_{i-1} to b_i and climbs from l_{i-1} to l_i (b_0 = l_0 = 0, b_k = l_k = 1).

    Cost: that of its schedules.

    When: a curve that no other schedule has, such as fast to 80 % of the target and slow from there.

    Args:
        schedules: at least one.
        boundaries: one fewer than the schedules, rising, each in (0, 1).
        levels: as many as the boundaries: the fraction of the target reached there.

    Raises:
        ValueError: the lengths do not fit, or a boundary or level is out of its range.

    Example:
        >>> join = Join(schedules=(Linear(), Constant()), boundaries=(0.5,), levels=(0.8,))
        >>> [join(p) for p in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.4, 1.0, 1.0]
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("schedules", "boundaries", "levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        fits = len(self.schedules) == len(self.boundaries) + 1 == len(self.levels) + 1
        if not fits:
            raise ValueError(
                "`boundaries` and `levels` have one entry fewer than `schedules`, but got "
                f"{len(self.boundaries)} and {len(self.levels)} for {len(self.schedules)}."
            )
        for level in self.levels:
            check_fraction("levels", level)
        edges = (0.0, *(check_number("boundaries", b) for b in self.boundaries), 1.0)
        if any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"`boundaries` rise from above 0 to below 1, but got {self.boundaries!r}.")

    def __call__(self, progress: float) -> float:
        part = bisect_right(self.boundaries, check_fraction("progress", progress))
        edges, levels = (0.0, *self.boundaries, 1.0), (0.0, *self.levels, 1.0)
        local = (progress - edges[part]) / (edges[part + 1] - edges[part])
        reached = self.schedules[part](local)
        return levels[part] + (levels[part + 1] - levels[part]) * reached
