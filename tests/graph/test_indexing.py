"""Reading and writing at positions: what the rules leave free can go, by trying it on the operations themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.graph.projection import mask_of
from lightning_prune.graph.rules import Op, rule_of
from lightning_prune.graph.run import plain_name
from lightning_prune.graph.types import Type, atoms, is_frozen

aten = torch.ops.aten


def real(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def places(most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(1))


MASK = torch.tensor([True, False, True, True, False])
CASES: dict[str, tuple[Any, tuple[Any, ...], set[tuple[int, int]]]] = {
    # operation, arguments, (tensor, dim) of what can go: tensors in the order of the arguments, the output is last
    "index_add along rows": (
        aten.index_add.default,
        (real(5, 4), 0, places(5, 7), real(7, 4)),
        {(0, 1), (2, 1), (3, 1)},
    ),
    "index_add along the last dim": (
        aten.index_add.default,
        (real(4, 6, 5), -1, places(5, 7), real(4, 6, 7)),
        {(0, 0), (0, 1), (2, 0), (2, 1), (3, 0), (3, 1)},
    ),
    "index_copy": (
        aten.index_copy.default,
        (real(5, 4), 0, places(5, 3), real(3, 4)),
        {(0, 1), (2, 1), (3, 1)},
    ),
    "index_fill": (aten.index_fill.int_Scalar, (real(5, 4), 0, places(5, 3), 2.0), {(0, 1), (2, 1)}),
    "index_reduce": (
        aten.index_reduce.default,
        (real(5, 4), 0, places(5, 7), real(7, 4), "amax"),
        {(0, 1), (2, 1), (3, 1)},
    ),
    "scatter_add": (
        aten.scatter_add.default,
        (real(5, 4), 0, places(5, 7, 4), real(7, 4)),
        {(0, 1), (1, 1), (2, 1), (3, 1)},
    ),
    "scatter_reduce": (
        aten.scatter_reduce.two,
        (real(5, 4), 0, places(5, 7, 4), real(7, 4), "mean"),
        {(0, 1), (1, 1), (2, 1), (3, 1)},
    ),
    "scatter of less than there is": (aten.scatter.src, (real(5, 4), 0, places(5, 3, 2), real(3, 4)), set()),
    "scatter of a number": (
        aten.scatter.value,
        (real(5, 4), 0, places(5, 3, 4), 1.0),
        {(0, 1), (1, 1), (2, 1)},
    ),
    "gather": (aten.gather.default, (real(5, 4), 0, places(5, 7, 4)), {(0, 1), (1, 1), (2, 1)}),
    "gather of some columns": (aten.gather.default, (real(5, 4), 0, places(5, 7, 2)), set()),
    "index of rows": (aten.index.Tensor, (real(5, 4, 3), [places(5, 7)]), {(0, 1), (0, 2), (2, 1), (2, 2)}),
    "index by a mask": (aten.index.Tensor, (real(5, 4), [MASK]), {(0, 1), (2, 1)}),
    "index by a mask of two dims": (aten.index.Tensor, (real(5, 4, 6), [real(5, 4) > 0]), {(0, 2), (2, 1)}),
    "index behind": (
        aten.index.Tensor,
        (real(4, 5, 6), [None, places(5, 2, 3)]),
        {(0, 0), (0, 2), (2, 0), (2, 3)},
    ),
    "index in two places": (aten.index.Tensor, (real(4, 5, 6), [places(4, 3), None, places(6, 3)]), set()),
    "index_put of rows": (
        aten.index_put.default,
        (real(5, 4, 3), [places(5, 7)], real(7, 4, 3), True),
        {(0, 1), (0, 2), (2, 1), (2, 2), (3, 1), (3, 2)},
    ),
    "index_put by a mask": (
        aten.index_put.default,
        (real(5, 4), [MASK], real(3, 4)),
        {(0, 1), (2, 1), (3, 1)},
    ),
    "index_put behind": (
        aten.index_put.default,
        (real(4, 5, 6), [None, places(5, 7)], real(4, 7, 6), True),
        {(0, 0), (0, 2), (2, 0), (2, 2), (3, 0), (3, 2)},
    ),
    "index_put of one row everywhere": (
        aten.index_put.default,
        (real(5, 4), [places(5, 7)], real(4), True),
        {(0, 1), (2, 0), (3, 1)},
    ),
    "index_put of one number": (
        aten.index_put.default,
        (real(5, 4), [places(5, 7)], torch.tensor(2.0)),
        {(0, 1), (3, 1)},
    ),
    "masked_scatter of rows": (
        aten.masked_scatter.default,
        (real(5, 4), MASK[:, None], real(3, 4)),
        {(0, 1), (2, 1), (3, 1)},
    ),
    "masked_scatter of more rows than it takes, the mask expanded": (
        aten.masked_scatter.default,
        (real(2, 5, 4), MASK[None, :, None].expand(2, 5, 4), real(9, 4)),
        {(0, 2), (1, 2), (2, 1), (3, 2)},
    ),
    "masked_scatter of single entries": (
        aten.masked_scatter.default,
        (real(5, 4), real(5, 4) > 0, real(20, 4)),
        set(),
    ),
    "masked_scatter of a row of numbers": (
        aten.masked_scatter.default,
        (real(5, 4), MASK[:, None], real(12)),
        set(),
    ),
    "index_put in two places": (
        aten.index_put.default,
        (real(4, 5, 6), [places(4, 3), None, places(6, 3)], real(3, 5)),
        set(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_can_go_and_nothing_else_changes(name: str) -> None:
    func, args, free = CASES[name]
    output = func(*args)
    tensors = [*(t for t in tree_leaves(args) if isinstance(t, Tensor)), output]
    types = {id(t): [Type(size) for size in t.shape] for t in tensors[:-1]}
    rule = rule_of(func, plain_name(func))
    assert rule is not None
    op = Op(plain_name(func), func, args, {}, output, "", lambda t: types[id(t)])
    types[id(output)] = list(rule(op))  # type: ignore[arg-type]
    nodes = [types[id(t)] for t in tensors]
    assert {(k, d) for k, ns in enumerate(nodes) for d, n in enumerate(ns) if not is_frozen(n)} == free
    for atom in {a for ns in nodes for n in ns for a in atoms(n) if not is_frozen(a)}:
        masks = {atom: torch.arange(atom.size) % 2 == 1}

        def cut(tensor: Tensor, masks: dict[Type, Tensor] = masks) -> Tensor:
            smaller = tensor
            for d, node in enumerate(types[id(tensor)]):
                smaller = smaller.index_select(d, mask_of(node, masks).nonzero().flatten())
            return smaller

        assert torch.equal(func(*tree_map_only(Tensor, cut, args)), cut(output))
