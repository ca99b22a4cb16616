"""Types that learn of each other: an atom becomes a product or a sum where code splits it, two types become one."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune.graph.types import (
    Type,
    annotate,
    atoms,
    concatenation,
    factors,
    find,
    freeze,
    frozen_type,
    is_frozen,
    product,
    sections,
)


class ConflictError(Exception):
    """Two types cannot be the same, or a type cannot be cut where it would have to be."""


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
