"""The nouns that decide what is pruned, together: a recipe is checked as a whole before any work starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_prune.core.budgets import Budget
from lightning_prune.core.checks import check_choice, check_count, check_noun, check_sparsity
from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.criteria.weights import Magnitude
from lightning_prune.core.granularities import Layer, Weight
from lightning_prune.core.patterns import check_patterns
from lightning_prune.core.scopes.allocations import Fixed
from lightning_prune.core.scopes.rankings import Global
from lightning_prune.core.solvers import needs_of
from lightning_prune.core.types import Couples, Criterion, Granularity, Name, Prescribes, Scope, Shape, Solver

SHRINK = ("end", "update", "never")


@dataclass(frozen=True)
class Recipe:
    """What is pruned, and how much of it in the end.

    Args:
        sparsity: fraction of the groups removed in the end, in [0, 1); numbers by name pattern, short for
            `scope=Fixed(...)`; or None where the scope prescribes it (N:M, Fixed).
        criterion: how good each weight is; with `Layer`, the default stands for the influence of blocks.
        granularity: what goes as one piece.
        scope: who competes with whom.
        include: patterns or module types to prune instead of the default (`select_targets`).
        exclude: patterns or module types to leave out.
        budget: what the smaller model may cost, in place of a sparsity; for coupled granularities.

    Raises:
        ValueError: a value out of its range, or two that contradict each other.
    """

    sparsity: float | Mapping[str, float] | None = None
    criterion: Criterion = field(default_factory=Magnitude)
    granularity: Granularity | Couples = field(default_factory=Weight)
    scope: Scope = field(default_factory=Global)
    include: Sequence[Any] | None = None
    exclude: Sequence[Any] = ()
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.exclude is None:  # as a command line may say it
            object.__setattr__(self, "exclude", ())
        for argument in ("include", "exclude"):
            if (patterns := getattr(self, argument)) is not None:
                object.__setattr__(self, argument, _checked(argument, patterns))
        self._check_nouns()
        if isinstance(self.sparsity, Mapping):
            if self.scope != Global():
                raise ValueError(
                    f"`sparsity` by pattern sets the scope, so none can be given, but got {self.scope}."
                )
            object.__setattr__(self, "scope", Fixed(self.sparsity))
            object.__setattr__(self, "sparsity", None)
        if isinstance(self.granularity, Layer):
            self._check_layer(self.granularity)
        self._check_sparsity()

    def _check_nouns(self) -> None:
        required_statistics(self.criterion)
        check_noun("scope", self.scope, "Global()", "__call__")
        if isinstance(self.granularity, type) or not isinstance(self.granularity, Couples):
            check_noun("granularity", self.granularity, "Weight()", "reduce", "expand")
        if getattr(self.criterion, "signed", False) and getattr(self.scope, "unsigned", False):
            raise ValueError(
                f"`scope` {type(self.scope).__name__} compares scores of at least 0, but got {self.criterion}, whose "
                "scores may be negative."
            )
        if not isinstance(self.budget, Budget | None):
            raise ValueError(f"`budget` is an object such as Budget(macs=0.5), but got {self.budget!r}.")

    def _check_layer(self, granularity: Layer) -> None:
        if self.scope != Global():
            raise ValueError(
                f"`scope` of blocks is Global(), one ranking of all, but got {self.scope} with {granularity}: leave it "
                "out."
            )
        if self.by_influence and granularity.reduction != Layer().reduction:
            raise ValueError(
                f"`reduction` is of the scores of a `criterion`, but got {granularity.reduction!r} without any other "
                "than the default, with which blocks are ranked by their influence: leave it out, or give one, such "
                "as Magnitude(p=2)."
            )

    @property
    def by_influence(self) -> bool:
        """Whether whole blocks are ranked by how much they change their input, and not by scores of weights."""
        return isinstance(self.granularity, Layer) and self.criterion == Magnitude()

    def _check_sparsity(self) -> None:
        if self.budget is not None:
            self._check_budget()
        elif isinstance(self.scope, Prescribes):
            if self.sparsity is not None:
                raise ValueError(
                    f"`sparsity` is prescribed by {self.scope}: leave it out, but got {self.sparsity!r}."
                )
        elif self.sparsity is None:
            raise ValueError(
                "`sparsity` is the fraction removed in the end, in [0, 1), but got None: say how much."
            )
        else:
            check_sparsity("sparsity", self.sparsity)

    def _check_budget(self) -> None:
        if self.sparsity is not None or isinstance(self.scope, Prescribes):
            raise ValueError(
                f"`budget` takes the place of `sparsity`, but got both: {self.budget} and "
                f"{self.scope if self.sparsity is None else self.sparsity}."
            )
        if not isinstance(self.granularity, Couples):
            raise ValueError(
                f"`budget` is for granularities that make the model smaller, but got {self.granularity}."
            )

    def final_sparsity(self, group_shapes: Mapping[Name, Shape]) -> float:
        """Return the sparsity, over all groups, that the schedule's 1 stands for."""
        if isinstance(self.scope, Prescribes):
            return self.scope.prescribed(group_shapes)
        assert isinstance(self.sparsity, (int, float))
        return float(self.sparsity)

    def describe(self) -> dict[str, str]:
        """Return the nouns as text, for reports and to notice a change after a resume."""
        nouns = {name: as_text(getattr(self, name)) for name in self.__dataclass_fields__}
        nouns |= {"criterion": "block influence"} if self.by_influence else {}
        return {name: text for name, text in nouns.items() if name != "budget" or self.budget is not None}


def as_text(noun: object) -> str:
    """Return what a noun prints as, the same in every process: without the address that a plain function prints.

    Example:
        >>> as_text(Magnitude(p=2)), as_text(len)
        ('Magnitude(p=2)', '<built-in function len>')
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(noun))


def _checked(argument: str, patterns: Any) -> tuple[Any, ...]:
    if isinstance(patterns, str):
        check_patterns(argument, patterns)
    if not isinstance(patterns, Iterable) or isinstance(patterns, Mapping):
        raise ValueError(f"`{argument}` is a list of patterns, but got {patterns!r}.")
    found = tuple(patterns)
    check_patterns(argument, [p for p in found if not isinstance(p, type)])
    return found


def checked_rounds(num_rounds: int, revive: bool = False, budget: Budget | None = None) -> int:
    """Return in how many rounds a recipe prunes, from a dense model to its final sparsity.

    Raises:
        ValueError: no whole number of at least 1, a single round after which nothing could come back, or several
            towards a budget, whose sparsity is known only after the first.
    """
    check_count("num_rounds", num_rounds, minimum=1)
    if revive and num_rounds == 1:
        raise ValueError(
            "`revive` lets weights come back in later rounds, but got num_rounds=1: there are none."
        )
    if budget is not None and num_rounds > 1:
        raise ValueError(f"`num_rounds` is 1 with a budget, but got {num_rounds} with {budget}.")
    return num_rounds


def checked_shrink(
    shrink: str | None, granularity: Granularity | Couples, choices: Sequence[str] = SHRINK
) -> str | None:
    """Return when a model shrinks in training: None where the granularity cannot make it smaller.

    Raises:
        ValueError: an unknown time, one where there is none, or a granularity that training cannot ramp up.
    """
    if not isinstance(granularity, Couples):
        if shrink is not None:
            raise ValueError(
                f"`shrink` is for granularities of coupled groups, Channel and Head, but got {shrink!r} with "
                f"{granularity}."
            )
        return None
    if isinstance(granularity, Layer):
        raise ValueError(
            "`granularity` Layer takes out whole blocks at once, which cannot ramp up in training: use "
            f"PostTrainingPruning, but not {granularity} here."
        )
    return check_choice("shrink", "end" if shrink is None else shrink, choices)


def checked_solver(
    solver: Solver | None,
    granularity: Granularity | Couples,
    blocks: str | None = None,
    num_rounds: int = 1,
) -> Solver | None:
    """Return a solver that fits the granularity.

    Raises:
        ValueError: one that chooses single weights, where pieces are taken out of the model; whole layers, for which
            nothing makes up; more than one round; or `blocks` that are no path of a module, or without a solver.
    """
    if blocks is not None and (solver is None or not isinstance(blocks, str)):
        raise ValueError(f"`blocks` is the path of a module, for a solver, but got {blocks!r} for {solver}.")
    if solver is None:
        return None
    check_noun("solver", solver, "SparseGPT()", "__call__")
    if num_rounds != 1:
        raise ValueError(f"`num_rounds` is 1 with a solver, but got {num_rounds}.")
    if isinstance(granularity, Layer) or (
        isinstance(granularity, Couples) and not set(needs_of(solver)) <= {"weight", "gram", "mask"}
    ):
        raise ValueError(
            "`solver` for channels and heads is one that gives the best values to what stays, LeastSquares(), but got "
            f"{solver} with {granularity}."
        )
    return solver
