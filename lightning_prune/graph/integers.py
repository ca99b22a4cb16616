"""Integers that remember where they come from, so that hard-coded sizes can be solved for.

While a model is traced, integer attributes of modules and the sizes of tensors are `TracedInt`s: `view(B, N,
self.num_heads, C // self.num_heads)` then says which attribute must equal the size of which type.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_prune.graph.projection import Counts, size_of
from lightning_prune.graph.types import Type


@dataclass(frozen=True)
class Constant:
    """A number written in the code, or one whose origin is not known."""

    value: float


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module, or one entry of a tuple of integers.

    Args:
        path: of the module.
        name: of the attribute.
        index: of the entry, or None where the attribute is a number.
        value: what it is now.
    """

    path: str
    name: str
    index: int | None
    value: int


@dataclass(frozen=True, eq=False)
class Size:
    """The size of a dim of this type."""

    type: Type


@dataclass(frozen=True, eq=False)
class Operation:
    """A function of two expressions."""

    function: Callable[[Any, Any], Any]
    left: Expression
    right: Expression


Expression: TypeAlias = Constant | Attribute | Size | Operation
Environment: TypeAlias = Mapping[Attribute, int]


def evaluate(expression: Expression, counts: Counts, attributes: Environment) -> float:
    """Return the value when atoms keep `counts` indices and attributes are as given (as they were, where not).

    Raises:
        ArithmeticError: a division by zero.
    """
    if isinstance(expression, Constant):
        return expression.value
    if isinstance(expression, Attribute):
        return attributes.get(expression, expression.value)
    if isinstance(expression, Size):
        return size_of(expression.type, counts)
    left = evaluate(expression.left, counts, attributes)
    result: float = expression.function(left, evaluate(expression.right, counts, attributes))
    return result


def attributes_of(expression: Expression) -> Iterator[Attribute]:
    """Yield the attributes that an expression reads."""
    if isinstance(expression, Attribute):
        yield expression
    elif isinstance(expression, Operation):
        yield from attributes_of(expression.left)
        yield from attributes_of(expression.right)


def types_of(expression: Expression) -> Iterator[Type]:
    """Yield the types whose sizes an expression reads."""
    if isinstance(expression, Size):
        yield expression.type
    elif isinstance(expression, Operation):
        yield from types_of(expression.left)
        yield from types_of(expression.right)


def expression_of(value: float) -> Expression:
    """Return where a number comes from."""
    return value.expression if isinstance(value, (TracedInt, TracedFloat)) else Constant(value)


class TracedFloat(float):
    """A float that remembers how it was computed from sizes, as `head_dim ** -0.5` is."""

    expression: Expression

    def __new__(cls, value: float, expression: Expression) -> TracedFloat:
        """Make one of a plain number and its origin."""
        made = super().__new__(cls, value)
        made.expression = expression
        return made

    def __neg__(self) -> Any:
        return self * -1

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)


class TracedInt(int):
    """An integer that remembers how it was computed from sizes and attributes."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> TracedInt:
        """Make one of a plain number and its origin."""
        made = super().__new__(cls, value)
        made.expression = expression
        return made

    def __neg__(self) -> Any:
        return self * -1

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


def traced_sqrt(value: float) -> float:
    """Compute a square root, traced where its argument is: stands in for `math.sqrt` while a model is traced."""
    root = math.pow(value, 0.5)
    return (
        traced(root, Operation(operator.pow, expression_of(value), Constant(0.5)))
        if is_traced(value)
        else root
    )


def is_traced(value: object) -> bool:
    """Whether a number remembers where it comes from."""
    return isinstance(value, (TracedInt, TracedFloat))


def traced(value: Any, expression: Expression) -> Any:
    """Wrap a number; anything else stays what it is."""
    if type(value) is int:
        return TracedInt(value, expression)
    return TracedFloat(value, expression) if type(value) is float else value


def _define(name: str, function: Callable[[Any, Any], Any]) -> None:
    """Let both classes remember one binary operation, in both orders."""

    def plain(value: Any, other: Any) -> Any:
        return float(value) if isinstance(value, float) or isinstance(other, float) else int(value)

    def operate(left: Any, right: Any) -> Any:
        if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
            return NotImplemented
        result = function(plain(left, right), plain(right, left))
        return traced(result, Operation(function, expression_of(left), expression_of(right)))

    for cls in (TracedInt, TracedFloat):
        setattr(cls, f"__{name}__", lambda self, other: operate(self, other))
        setattr(cls, f"__r{name}__", lambda self, other: operate(other, self))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _define(_name, getattr(operator, _name))
