"""Dimension types: what the indices of a tensor's dim stand for.

A type is an *atom* (n independent indices), a *product* (a row-major merge, as view and flatten make it) or a *sum*
(a concatenation, as cat and split make it). Types that must agree are unified, as Hindley-Milner unifies types
(Milner 1978); an atom that something outside depends on is *frozen*, with the reason. What is left are the groups: to
take index i away from an atom is to take it away everywhere that the atom occurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

Kind = Literal["atom", "product", "sum"]


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
