"""The interfaces of the library, in one place.

`Name` is a parameter's fully qualified name. A score says how good a weight (or a group of weights) is, higher
is kept; a mask is boolean, True is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Name: TypeAlias = str
Shape: TypeAlias = tuple[int, ...]
Stats: TypeAlias = Mapping[str, Any]
"""What is known of one parameter, by the names that criteria ask for: `weight`, `grad`, `input_norm`, ..."""
Scores: TypeAlias = "Mapping[Name, Tensor]"
"""Scores of every parameter. It may be lazy: each access computes them anew, so read each name as seldom as you can."""
Masks: TypeAlias = "dict[Name, Tensor]"
Criterion: TypeAlias = "Callable[..., Tensor]"
"""How good is each weight: (*, weight, ...) -> scores of its shape. Its keyword-only arguments declare its needs.

One that scores whole outputs of a layer says so by an attribute `per_output = True`: of coupled channels only the
layers that write them are read, since to those that read them it gives every channel the same. One whose scores may be
below 0 says `signed = True`, and scopes that cannot rank such scores say `unsigned = True`: they do not go together."""


BY_ROWS = "by_rows"
"""Where weights are spread over processes along dim 0, a criterion, granularity or scope with a true attribute of this
name makes of some rows what it makes of them within the whole: a criterion scores each row by the statistics of that
row, groups of a granularity lie within rows, a masking (which has to have it) turns the gradient of each row by that
row, and a scope chooses by `core.keep_top` of the mapping it is given, or row
by row. For others, the tensors are put together first, one at a time."""
Solver: TypeAlias = "Callable[..., tuple[Tensor, Tensor]]"
"""How the weights that stay make up for others: (*, weight, ...) -> new weight and mask, (out, in) all."""


class Across(Protocol):
    """The processes that hold a part each of the same scores. All of them make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """The place of this process among them, which is that of its rows."""
        ...

    def sum(self, counts: Tensor) -> Tensor:
        """Return the sum of the counts (*shape,) int64 of all processes."""
        ...

    def collect(self, counts: Tensor) -> Tensor:
        """Return the counts of each process, (processes, *shape)."""
        ...


class Regularizer(Protocol):
    """A penalty on the norms of the indices of coupled groups."""

    @property
    def over(self) -> str:
        """What counts: all "weights", or the "scales" of batch norms."""
        ...

    def __call__(self, *, norm: Tensor, count: Tensor) -> Tensor:
        """Return the factor by which each index's weights are added to their gradient, (size,)."""
        ...


class LazyScores(Mapping[Name, "Tensor"]):
    """Scores that are computed when they are read, one parameter at a time, and not kept.

    Args:
        shapes: the parameters in their order, and what shape their scores have.
        compute: name -> scores; it returns the same values each time.
        across: the processes, where `compute` returns the part of the scores that lies on this one; `shapes` are those
            of the whole.
        pieces: name -> the same scores in their flat order, piece by piece, where they need not be there at once.
    """

    def __init__(
        self,
        shapes: Mapping[Name, Shape],
        compute: Callable[[Name], Tensor],
        across: Across | None = None,
        pieces: Callable[[Name], Iterable[Tensor]] | None = None,
    ) -> None:
        self.shapes, self._compute, self.across = dict(shapes), compute, across
        self._pieces = pieces if across is None else None

    def __getitem__(self, name: Name) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._compute(name)

    def pieces(self, name: Name) -> Iterable[Tensor]:
        """Return the scores of a parameter in their flat order, in one piece or in several."""
        return (self[name],) if self._pieces is None else self._pieces(name)

    def __iter__(self) -> Iterator[Name]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def unread(shapes: Mapping[Name, Shape]) -> LazyScores:
    """Return scores of which only the shapes can be asked for."""

    def compute(name: Name) -> Tensor:
        raise AssertionError(f"{name} has no scores yet")

    return LazyScores(shapes, compute)


class GroupScores(dict[Name, "Tensor"]):
    """Scores of coupled groups, one tensor (size,) for each, and which groups are of one kind.

    Args:
        scores: group -> scores.
        kinds: group -> what it is: equal for groups in alike places, such as those of repeated layers.
    """

    def __init__(self, scores: Mapping[Name, Tensor], kinds: Mapping[Name, str]) -> None:
        super().__init__(scores)
        self.kinds = dict(kinds)


def shapes_of(scores: Scores) -> dict[Name, Shape]:
    """Return the shape of each parameter's scores, without computing those of lazy ones."""
    if isinstance(scores, LazyScores):
        return scores.shapes
    return {name: tuple(tensor.shape) for name, tensor in scores.items()}


def across_of(scores: Scores) -> Across | None:
    """Return the processes that scores are spread over, or None where they are all here."""
    return scores.across if isinstance(scores, LazyScores) else None


def pieces_of(scores: Scores, name: Name) -> Iterable[Tensor]:
    """Return the scores of a parameter in their flat order; those of a lazy one are not there all at once."""
    return scores.pieces(name) if isinstance(scores, LazyScores) else (scores[name],)


def some_of(scores: Scores, *names: Name) -> LazyScores:
    """Return the scores of some parameters, still lazy, and still parts where they are."""
    shapes = shapes_of(scores)
    pieces = partial(pieces_of, scores)
    return LazyScores({name: shapes[name] for name in names}, scores.__getitem__, across_of(scores), pieces)


class Schedule(Protocol):
    """Along which curve: a pure function of the progress through the window."""

    def __call__(self, progress: float) -> float:
        """Return the fraction of the target sparsity, in [0, 1], at `progress` in [0, 1]."""
        ...


class Granularity(Protocol):
    """What goes as one piece."""

    def reduce(self, scores: Tensor) -> Tensor:
        """Turn scores of weights into scores of groups."""
        ...

    def expand(self, mask: Tensor, shape: Shape) -> Tensor:
        """Turn a mask of groups into a mask of the weights, of `shape`."""
        ...


class Scope(Protocol):
    """Who competes with whom."""

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        """Return masks of the groups in which a fraction of `sparsity` is removed."""
        ...


@runtime_checkable
class Checks(Protocol):
    """A scope that can tell from shapes alone what sparsities it cannot reach."""

    def check(self, scores: Scores, sparsity: float) -> None:
        """Refuse a sparsity out of reach; only the shapes of the scores are read."""
        ...


class Masking(Protocol):
    """What becomes of pruned weights while masks may still change."""

    def gradient(self, *, weight: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        """Return the gradient of a weight, from that of the masked one which the network has read."""
        ...


@runtime_checkable
class Couples(Protocol):
    """A granularity whose pieces reach across tensors: coupled groups, which can be taken out for real."""

    def prunes(self, role: str) -> bool:
        """Whether groups of a role are pruned."""
        ...


@runtime_checkable
class Divides(Protocol):
    """A scope that keeps a number of weights in each row by itself, as PerRow and N:M do."""

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of a parameter, (R, C)."""
        ...

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """Undo `rows`: return a tensor of `shape`."""
        ...


@runtime_checkable
class Prescribes(Protocol):
    """A scope that sets the final sparsity itself, as N:M does; the user gives none."""

    def prescribed(self, shapes: Mapping[Name, Shape]) -> float:
        """Return the overall sparsity, in [0, 1), that group scores of `shapes` end at."""
        ...
