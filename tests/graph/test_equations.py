"""Hard-coded sizes are solved for."""

import operator

import pytest

from lightning_prune.graph.equations import Equation, solve, ties
from lightning_prune.graph.integers import (
    Attribute,
    Constant,
    Operation,
    Size,
    TracedFloat,
    TracedInt,
    evaluate,
    expression_of,
    traced_sqrt,
)
from lightning_prune.graph.types import Type, concatenation, find, product

HEADS = Attribute("attention", "num_heads", None, 4)
WIDTH = Attribute("attention", "width", None, 64)


def test_an_attribute_takes_the_size_of_its_type() -> None:
    heads = Type(4)
    assert solve([Equation(HEADS, heads, "view")], {heads: 3}) == ({HEADS: 3}, [])


def test_a_quotient_of_two_attributes_is_solved_for_the_one_that_is_left() -> None:
    heads, head_dim = Type(4), Type(16)
    quotient = Operation(operator.floordiv, WIDTH, HEADS)
    equations = [Equation(quotient, head_dim, "view"), Equation(HEADS, heads, "view")]
    found, broken = solve(equations, {heads: 2, head_dim: 8})
    assert (found, broken) == ({HEADS: 2, WIDTH: 16}, [])
    assert evaluate(quotient, {heads: 2, head_dim: 8}, found) == 8


def test_an_attribute_that_would_need_two_values_names_what_loses_indices() -> None:
    first, second = Type(4), Type(4)
    equations = [Equation(HEADS, first, "view of a"), Equation(HEADS, second, "view of b")]
    _, broken = solve(equations, {first: 2})
    assert [(equation.where, involved) for equation, involved in broken] in (
        [("view of b", [first])],
        [("view of a", [first])],
    )
    assert "attention.num_heads" in broken[0][0].reason


def test_a_division_by_zero_is_no_solution() -> None:
    head_dim = Type(16)
    zero = Operation(operator.floordiv, Constant(16), Operation(operator.sub, Size(head_dim), Constant(16)))
    assert not Equation(zero, head_dim, "view").holds({}, {})


def test_ties_are_atoms_that_one_attribute_is_equal_to() -> None:
    first, second, other = Type(8), Type(8), Type(8)
    equations = [
        Equation(HEADS, first, ""),
        Equation(HEADS, second, ""),
        Equation(Size(first), other, "chunk"),
    ]
    assert ties(equations) == [(first, second), (first, other)]
    assert ties([Equation(HEADS, product([Type(2), Type(2)]), ""), Equation(HEADS, first, "")]) == []


def test_what_both_sides_have_ties_nothing_and_the_rest_is_tied() -> None:
    heads, wide, other, narrow = Type(4), Type(8), Type(8), Type(2)
    keys, values, mixed = (product([heads, width]) for width in (wide, other, wide))
    assert ties([Equation(Size(keys), values, "chunk")]) == [(wide, other)]
    assert ties([Equation(Size(keys), mixed, "chunk")]) == []
    sums = [concatenation([product([heads, width]), narrow]) for width in (wide, other)]
    assert ties([Equation(Size(sums[0]), sums[1], "chunk")]) == [(wide, other)]
    unlike = product([Type(4), Type(8)])
    assert ties([Equation(Size(keys), unlike, "chunk")]) == []


@pytest.mark.parametrize(
    "compute",
    [
        lambda n: n + 1,
        lambda n: 3 * n,
        lambda n: n - 2,
        lambda n: 100 - n,
        lambda n: n // 2,
        lambda n: n % 5,
        lambda n: 96 // n,
        lambda n: n**2,
        lambda n: (n // 2) ** -0.5,
        lambda n: 1 / traced_sqrt(n),
        lambda n: n * 0.5,
        lambda n: (n * 2 + n) // 3,
    ],
)
def test_traced_numbers_are_recomputed(compute: object) -> None:
    assert callable(compute)
    node = Type(8)
    traced = compute(TracedInt(8, Size(node)))
    assert traced == compute(8) and isinstance(traced, (TracedInt, TracedFloat))
    assert evaluate(expression_of(traced), {find(node): 6}, {}) == pytest.approx(compute(6))
