"""Equations between hard-coded sizes and types, solved for the attributes once it is chosen what goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_prune.graph.integers import (
    Attribute,
    Environment,
    Expression,
    Size,
    attributes_of,
    evaluate,
    types_of,
)
from lightning_prune.graph.projection import Counts, size_of
from lightning_prune.graph.types import Type, atoms, is_frozen


@dataclass(frozen=True, eq=False)
class Equation:
    """The code asks for `expression` indices where a dim of `type` is.

    Args:
        expression: what the code computes.
        type: of the dim.
        where: the operation and the module, for messages.
    """

    expression: Expression
    type: Type
    where: str

    def holds(self, counts: Counts, attributes: Environment) -> bool:
        """Whether both sides are equal; a division by zero makes them unequal."""
        try:
            return evaluate(self.expression, counts, attributes) == size_of(self.type, counts)
        except ArithmeticError:
            return False

    @property
    def reason(self) -> str:
        """Why a type that this equation stands against is frozen."""
        names = sorted({f"{a.path}.{a.name}".lstrip(".") for a in attributes_of(self.expression)})
        return f"hard-coded size in {self.where}" + (f" ({', '.join(names)})" if names else "")


def solve(
    equations: Sequence[Equation], counts: Counts
) -> tuple[dict[Attribute, int], list[tuple[Equation, list[Type]]]]:
    """Find the attributes' values at which all equations hold.

    An attribute that stands alone in an equation takes the size of the type. One that stands in an expression is
    assumed to be proportional to the size.

    Args:
        equations: as the trace found them.
        counts: how many indices atoms keep.

    Returns:
        The values of all attributes that are determined, and the equations that cannot hold, each with the types
        that it is about.
    """
    found: dict[Attribute, int] = {}
    for equation in equations:
        if isinstance(equation.expression, Attribute):
            found.setdefault(equation.expression, size_of(equation.type, counts))
    for equation in equations:
        for attribute in attributes_of(equation.expression):
            if attribute not in found and not equation.holds(counts, found):
                _try_proportional(equation, attribute, counts, found)
    broken = [equation for equation in equations if not equation.holds(counts, found)]
    return found, [(equation, _involved(equation, equations, counts)) for equation in broken]


def _try_proportional(
    equation: Equation, attribute: Attribute, counts: Counts, found: dict[Attribute, int]
) -> None:
    """Set an attribute to what makes an equation hold, if the expression is proportional to it."""
    try:
        now = evaluate(equation.expression, counts, found)
    except ArithmeticError:
        return
    if now > 0:
        value = round(attribute.value * size_of(equation.type, counts) / now)
        if equation.holds(counts, {**found, attribute: value}):
            found[attribute] = value


def _involved(equation: Equation, equations: Iterable[Equation], counts: Counts) -> list[Type]:
    """Return the atoms that lose indices and keep the equation from holding."""
    shared = set(attributes_of(equation.expression))
    types = [equation.type, *types_of(equation.expression)]
    for other in equations:
        if shared & set(attributes_of(other.expression)):
            types += [other.type, *types_of(other.expression)]
    return [a for a in dict.fromkeys(a for t in types for a in atoms(t)) if counts.get(a, a.size) != a.size]


def ties(equations: Iterable[Equation]) -> list[tuple[Type, Type]]:
    """Return pairs of atoms that must keep equally many indices, as the halves of a chunk must, not the same ones."""
    first: dict[object, Type] = {}
    pairs = []
    for equation in equations:
        if isinstance(equation.expression, Size):
            pairs.append((equation.expression.type, equation.type))
        elif isinstance(equation.expression, Attribute):
            pairs.append((first.setdefault(equation.expression, equation.type), equation.type))
    unlike = (_unlike(a, b) for a, b in pairs)
    return [(a[0], b[0]) for a, b in unlike if len(a) == len(b) == 1 and a[0].size == b[0].size]


def _unlike(first: Type, second: Type) -> tuple[list[Type], list[Type]]:
    """Return the atoms that are not frozen of each type, without those that both have, as both have the heads."""
    a, b = (Counter(atom for atom in atoms(node) if not is_frozen(atom)) for node in (first, second))
    return list((a - b).elements()), list((b - a).elements())
