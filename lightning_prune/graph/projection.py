"""From index sets of atoms to tensors' dims and back: sizes, masks, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.graph.types import Type, find

Counts = Mapping[Type, int]
"""How many indices each atom keeps; an atom that is not named keeps all."""


def size_of(node: Type, counts: Counts) -> int:
    """Return the size that a type has when its atoms keep `counts` indices.

    Example:
        >>> from lightning_prune.graph.types import concatenation, product
        >>> heads, width = Type(4), Type(16)
        >>> size_of(concatenation([product([heads, width]), width]), {width: 8})
        40
    """
    node = find(node)
    if node.kind == "sum":
        return sum(size_of(part, counts) for part in node.parts)
    if node.kind == "product":
        return math.prod(size_of(part, counts) for part in node.parts)
    return counts.get(node, node.size)


def mask_of(node: Type, masks: Mapping[Type, Tensor]) -> Tensor:
    """Return the mask (size,) of a dim, True is kept, from those of its atoms; an atom without one is kept whole.

    Example:
        >>> from lightning_prune.graph.types import product
        >>> heads, width = Type(2), Type(2)
        >>> mask_of(product([heads, width]), {width: torch.tensor([True, False])})
        tensor([ True, False,  True, False])
    """
    node = find(node)
    if node.kind == "sum":
        return torch.cat([mask_of(part, masks) for part in node.parts])
    if node.kind == "product":
        mask = torch.ones(1, dtype=torch.bool)
        for part in node.parts:
            mask = (mask[:, None] & mask_of(part, masks)[None]).flatten()
        return mask
    return masks[node] if node in masks else torch.ones(node.size, dtype=torch.bool)


def project(values: Tensor, node: Type, atom: Type) -> Tensor:
    """Sum values (size of `node`,) over all positions that belong to each index of an atom.

    Args:
        values: one for each index of a tensor's dim.
        node: the type of that dim.
        atom: one of its atoms.

    Returns:
        Tensor (size of `atom`,).

    Example:
        >>> from lightning_prune.graph.types import product
        >>> heads, width = Type(2), Type(2)
        >>> project(torch.tensor([1.0, 2.0, 3.0, 4.0]), product([heads, width]), width)
        tensor([4., 6.])
    """
    node, atom = find(node), find(atom)
    if node is atom:
        return values
    total = values.new_zeros(atom.size)
    if node.kind == "sum":
        pieces = values.split([find(part).size for part in node.parts])
        for part, piece in zip(node.parts, pieces, strict=True):
            total = total + project(piece, part, atom)
    elif node.kind == "product":
        grid = values.view([find(part).size for part in node.parts])
        for dim, part in enumerate(node.parts):
            others = [d for d in range(grid.dim()) if d != dim]
            total = total + project(grid.sum(others), part, atom)
    return total


def occurrences(node: Type, atom: Type) -> int:
    """Return how many positions of a dim belong to each index of an atom.

    Example:
        >>> from lightning_prune.graph.types import product
        >>> heads, width = Type(2), Type(8)
        >>> occurrences(product([heads, width]), heads), occurrences(width, heads)
        (8, 0)
    """
    node, atom = find(node), find(atom)
    if node is atom:
        return 1
    if node.kind == "sum":
        return sum(occurrences(part, atom) for part in node.parts)
    return sum(occurrences(part, atom) * node.size // find(part).size for part in node.parts)


def positions(node: Type, atom: Type) -> Tensor:
    """Return, for each position of a dim, which index of an atom it belongs to; -1 where to none.

    Example:
        >>> from lightning_prune.graph.types import concatenation, product
        >>> heads, width, rest = Type(2), Type(2), Type(1)
        >>> positions(concatenation([product([heads, width]), rest]), heads)
        tensor([ 0,  0,  1,  1, -1])
    """
    node, atom = find(node), find(atom)
    if node is atom:
        return torch.arange(atom.size)
    if node.kind == "sum":
        return torch.cat([positions(part, atom) for part in node.parts])
    sizes = [find(part).size for part in node.parts]
    found = torch.full(sizes or [node.size], -1)
    for dim, part in enumerate(node.parts):
        along = positions(part, atom).view([-1 if d == dim else 1 for d in range(len(sizes))])
        found = torch.maximum(found, along.expand(sizes))
    return found.flatten()
