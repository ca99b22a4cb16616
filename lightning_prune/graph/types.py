"""Dimension types: what the indices of a tensor's dim stand for.

A type is an *atom* (n independent indices), a *product* (a row-major merge, as view and flatten make it) or a *sum*
(a concatenation, as cat and split make it). Types that must agree are unified, as Hindley-Milner unifies types
(Milner 1978); an atom that something outside depends on is *frozen*, with the reason. What is left are the groups: to
take index i away from an atom is to take it away everywhere that the atom occurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

Kind = Literal["atom", "product", "sum"]


class ConflictError(Exception):
    """Two types cannot be the same, or a type cannot be cut where it would have to be."""


class Type:
    """One node of the forest of types; `find` leads to the node that stands for it now.

    Args:
        size: number of indices, at least 0.
        reason: why it is frozen, or None where it is not; only atoms can be frozen.
        kind: "atom", "product" or "sum".
        parts: the factors or sections, outermost first.

    Example:
        >>> heads, head_dim = Type(4), Type(16)
        >>> product([heads, head_dim]), frozen_type(3, "model output")
        ((4 x 16), !3)
    """

    __slots__ = ("_now", "kind", "notes", "parts", "reason", "size")

    def __init__(
        self, size: int, reason: str | None = None, kind: Kind = "atom", parts: tuple[Type, ...] = ()
    ) -> None:
        self.size, self.reason, self.kind, self.parts = size, reason, kind, parts
        self.notes: frozenset[str] = frozenset()
        self._now: Type | None = None

    def __repr__(self) -> str:
        node = find(self)
        if node.kind == "atom":
            return f"{'!' if node.reason else ''}{node.size}"
        return "(" + {"product": " x ", "sum": " + "}[node.kind].join(map(repr, node.parts)) + ")"


def find(node: Type) -> Type:
    """Return the node that stands for this one."""
    while node._now is not None:
        if node._now._now is not None:
            node._now = node._now._now
        node = node._now
    return node


def frozen_type(size: int, reason: str) -> Type:
    """Return a new frozen atom."""
    return Type(size, reason)


def is_frozen(node: Type) -> bool:
    """Whether no index can go: all atoms are frozen, or there is only one index."""
    node = find(node)
    if node.kind == "atom":
        return node.reason is not None or node.size <= 1
    return all(is_frozen(part) for part in node.parts)


def freeze(node: Type, reason: str) -> None:
    """Freeze all atoms that are not frozen yet."""
    for atom in atoms(node):
        atom.reason = atom.reason or reason


def annotate(node: Type, note: str) -> None:
    """Leave a note on all atoms."""
    for atom in atoms(node):
        atom.notes |= {note}


def atoms(node: Type) -> Iterator[Type]:
    """Yield the atoms from left to right, each as often as it occurs."""
    node = find(node)
    if node.kind == "atom":
        yield node
    for part in node.parts:
        yield from atoms(part)


def factors(node: Type) -> list[Type]:
    """Return what a type is the product of, outermost first, without factors of size 1."""
    node = find(node)
    if node.kind == "product":
        return [factor for part in node.parts for factor in factors(part)]
    return [node] if node.size != 1 else []


def sections(node: Type) -> list[Type]:
    """Return what a type is the sum of; a product whose outermost factor is a sum is the sum of products."""
    node = find(node)
    if node.kind == "sum":
        return [section for part in node.parts for section in sections(part)]
    if node.kind == "product":
        outer, *inner = factors(node)
        if find(outer).kind == "sum":
            return [piece for s in sections(outer) for piece in sections(product([s, *inner]))]
    return [node] if node.size else []


def product(nodes: Iterable[Type]) -> Type:
    """Return the type of a row-major merge, outermost first."""
    found = [factor for node in nodes for factor in factors(node)]
    if len(found) == 1:
        return found[0]
    if not found:
        return frozen_type(1, "of size 1")
    return Type(math.prod(f.size for f in found), None, "product", tuple(found))


def concatenation(nodes: Iterable[Type]) -> Type:
    """Return the type of a concatenation; what is frozen as a whole becomes one frozen atom."""
    found = [section for node in nodes for section in sections(node)]
    size = sum(find(section).size for section in found)
    if not found or all(is_frozen(section) for section in found):
        reasons = (atom.reason for section in found for atom in atoms(section) if atom.reason)
        return frozen_type(size, next(reasons, "of size 1"))
    return found[0] if len(found) == 1 else Type(size, None, "sum", tuple(found))


def split_product(node: Type, outer: int) -> tuple[Type, Type]:
    """Return (outer, inner) factors of a type, which is refined to their product.

    Args:
        node: of size N.
        outer: size of the outer factor.

    Raises:
        ConflictError: it cannot be split there.
    """
    node = find(node)
    if outer == 1:
        return frozen_type(1, "of size 1"), node
    if outer == node.size:
        return node, frozen_type(1, "of size 1")
    if node.size % outer:
        raise ConflictError(f"{node.size} indices are no {outer} times anything")
    if node.kind == "atom":
        first, second = _like(node, outer), _like(node, node.size // outer)
        _become(node, Type(node.size, None, "product", (first, second)))
        return first, second
    if node.kind == "product":
        taken, left = take(factors(node), outer)
        return product(taken), product(left)
    return _split_sum(node, outer)


def _split_sum(node: Type, outer: int) -> tuple[Type, Type]:
    """Split a sum into blocks of equal size: its sections are whole blocks, or each block is a like sum."""
    inner = node.size // outer
    found = sections(node)
    if all(section.size % inner == 0 for section in found):
        pairs = [split_product(section, section.size // inner) for section in found]
        for _, other in pairs[1:]:
            unify(pairs[0][1], other)
        return concatenation(first for first, _ in pairs), pairs[0][1]
    blocks, rest = [], node
    for _ in range(outer):
        block, rest = cut(rest, inner)
        blocks.append(block)
    for block in blocks[1:]:
        unify(blocks[0], block)
    return frozen_type(outer, "blocks of a concatenation"), blocks[0]


def take(found: Sequence[Type], size: int) -> tuple[list[Type], list[Type]]:
    """Split factors into outer ones, whose sizes multiply to `size`, and the rest.

    Raises:
        ConflictError: no boundary between factors lies there, and none can be made.
    """
    rest, taken = list(found), []
    while size > 1:
        if not rest:
            raise ConflictError(f"no factor is left for {size} indices")
        node = find(rest.pop(0))
        if node.kind == "product":
            rest = [*factors(node), *rest]
        elif size % node.size == 0:
            taken.append(node)
            size //= node.size
        elif node.size % size == 0:
            outer, inner = split_product(node, size)
            taken.append(outer)
            rest.insert(0, inner)
            size = 1
        else:
            raise ConflictError(f"{node.size} indices against {size}")
    return taken, rest


def cut(node: Type, position: int) -> tuple[Type, Type]:
    """Return the parts before and from `position` on of a type, which is refined to their sum.

    Raises:
        ConflictError: the cut lies within a product.
    """
    node = find(node)
    if position <= 0:
        return frozen_type(0, "empty"), node
    if position >= node.size:
        return node, frozen_type(0, "empty")
    if node.kind == "atom":
        first, second = _like(node, position), _like(node, node.size - position)
        _become(node, Type(node.size, None, "sum", (first, second)))
        return first, second
    if node.kind == "product":
        outer, *inner = factors(node)
        block = node.size // outer.size
        if position % block:
            raise ConflictError(f"a cut at {position} lies within blocks of {block}")
        first, second = cut(outer, position // block)
        return product([first, *inner]), product([second, *inner])
    before: list[Type] = []
    rest = sections(node)
    while position > 0:
        section = find(rest.pop(0))
        if section.size > position:
            first, second = cut(section, position)
            before.append(first)
            rest.insert(0, second)
        else:
            before.append(section)
        position -= section.size
    return concatenation(before), concatenation(rest)


def unify(first: Type, second: Type) -> None:
    """Make two types one: what is taken away from the one goes from the other too. A size of 1 is broadcast: no tie.

    Where they have no common structure, or one is frozen, both are frozen.

    Raises:
        ConflictError: their sizes differ.
    """
    first, second = find(first), find(second)
    if first is second or first.size == 1 or second.size == 1:
        return
    if first.size != second.size:
        raise ConflictError(f"{first.size} indices are not {second.size}")
    if is_frozen(first) or is_frozen(second):
        known, other = (first, second) if is_frozen(first) else (second, first)
        freeze(other, next((a.reason for a in atoms(known) if a.reason), "of size 1"))
    elif "atom" in (first.kind, second.kind):
        _become(*((first, second) if first.kind == "atom" else (second, first)))
    else:
        try:
            _unify_structures(first, second)
        except ConflictError as conflict:
            freeze(first, f"no common structure: {conflict}")
            freeze(second, f"no common structure: {conflict}")


def _unify_structures(first: Type, second: Type) -> None:
    if first.kind == second.kind == "product":
        _unify_factors(factors(first), factors(second))
        return
    if first.kind == "product":
        first, second = second, first
    *pieces, last = sections(first)
    rest = second
    for piece in pieces:
        head, rest = cut(rest, find(piece).size)
        unify(piece, head)
    unify(last, rest)


def _unify_factors(left: list[Type], right: list[Type]) -> None:
    while left and right:
        a, b = find(left.pop(0)), find(right.pop(0))
        if a.kind == "product":
            left, right = [*factors(a), *left], [b, *right]
        elif b.kind == "product":
            left, right = [a, *left], [*factors(b), *right]
        else:
            if a.size > b.size:
                a, inner = split_product(a, b.size)
                left.insert(0, inner)
            elif b.size > a.size:
                b, inner = split_product(b, a.size)
                right.insert(0, inner)
            unify(a, b)


def _like(node: Type, size: int) -> Type:
    """Return a piece of an atom: frozen as it is, with its notes."""
    piece = Type(size, node.reason)
    piece.notes = node.notes
    return piece


def _become(node: Type, other: Type) -> None:
    """Let `other` stand for an atom from now on; frozen atoms stay what they are, their pieces know the reason."""
    if node.reason is not None and find(other).kind != "atom":
        freeze(other, node.reason)
        return
    node._now = other
    if node.reason is not None:
        freeze(other, node.reason)
    for note in node.notes:
        annotate(other, note)
