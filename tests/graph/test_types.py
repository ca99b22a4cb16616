"""The algebra against brute force: programs that rearrange labelled entries."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.graph.projection import mask_of, project, size_of
from lightning_prune.graph.refinement import ConflictError, cut, split_product, unify
from lightning_prune.graph.rules.pointwise import broadcast
from lightning_prune.graph.rules.views import regroup
from lightning_prune.graph.types import (
    Type,
    atoms,
    concatenation,
    find,
    freeze,
    frozen_type,
    is_frozen,
    product,
)


@dataclass
class Tracked:
    """A tensor whose entries are the numbers of the leaf entries that they come from, and its types."""

    labels: Tensor
    types: list[Type]


def divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Tracked], list[Tracked]]:
    """Draw leaves, and what a random program of views, permutations, cuts, joins and sums makes of them."""
    start, leaves = 0, []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
        labels = torch.arange(start, start + math.prod(shape)).view(shape)
        start += labels.numel()
        leaves.append(Tracked(labels, [Type(n) if n > 1 else frozen_type(1, "of size 1") for n in shape]))
    made = [Tracked(leaf.labels, list(leaf.types)) for leaf in leaves]
    for _ in range(draw(st.integers(1, 8))):
        found = draw(st.sampled_from([reshaped, permuted, halved, joined, added]))(draw, made)
        if found is not None:
            made.append(found)
    return leaves, made


def reshaped(draw: st.DrawFn, made: list[Tracked]) -> Tracked:
    source = draw(st.sampled_from(made))
    sizes: list[int] = []
    left = source.labels.numel()
    while left > 1 and len(sizes) < 4:
        sizes.append(draw(st.sampled_from(divisors(left)[1:])))
        left //= sizes[-1]
    sizes.append(left)
    return Tracked(source.labels.reshape(sizes), regroup(source.types, sizes))


def permuted(draw: st.DrawFn, made: list[Tracked]) -> Tracked:
    source = draw(st.sampled_from(made))
    order = draw(st.permutations(range(source.labels.dim())))
    return Tracked(source.labels.permute(order), [source.types[d] for d in order])


def halved(draw: st.DrawFn, made: list[Tracked]) -> Tracked | None:
    source = draw(st.sampled_from(made))
    dim = draw(st.integers(0, source.labels.dim() - 1))
    size = source.labels.shape[dim]
    if size < 2:
        return None
    position = draw(st.integers(1, size - 1))
    try:
        first, second = cut(source.types[dim], position)
    except ConflictError as conflict:  # as the rule for split does
        freeze(source.types[dim], str(conflict))
        first, second = frozen_type(position, "cut"), frozen_type(size - position, "cut")
    is_first = draw(st.booleans())
    piece = source.labels.narrow(dim, 0 if is_first else position, position if is_first else size - position)
    types = list(source.types)
    types[dim] = first if is_first else second
    return Tracked(piece, types)


def joined(draw: st.DrawFn, made: list[Tracked]) -> Tracked | None:
    first, second = draw(st.sampled_from(made)), draw(st.sampled_from(made))
    dim = draw(st.integers(0, first.labels.dim() - 1))
    shapes = [[n for d, n in enumerate(t.labels.shape) if d != dim] for t in (first, second)]
    if first.labels.dim() != second.labels.dim() or shapes[0] != shapes[1]:
        return None
    for d in range(first.labels.dim()):
        if d != dim:
            unify(first.types[d], second.types[d])
    types = list(first.types)
    types[dim] = concatenation([first.types[dim], second.types[dim]])
    return Tracked(torch.cat([first.labels, second.labels], dim), types)


def added(draw: st.DrawFn, made: list[Tracked]) -> Tracked | None:
    """Unify two tensors of one shape, and go on with either: what is kept in the one is kept in the other."""
    first, second = draw(st.sampled_from(made)), draw(st.sampled_from(made))
    if first.labels.shape != second.labels.shape:
        return None
    types = broadcast([first.types, second.types])
    return Tracked(draw(st.sampled_from([first, second])).labels, types)


def joint_mask(tracked: Tracked, masks: dict[Type, Tensor]) -> Tensor:
    """Return which entries of a tensor are kept: those whose index is kept along every dim."""
    kept = torch.ones(tracked.labels.shape, dtype=torch.bool)
    for dim, node in enumerate(tracked.types):
        along = mask_of(node, masks)
        kept &= along.view([-1 if d == dim else 1 for d in range(kept.dim())])
    return kept


@settings(max_examples=300)
@given(program=programs(), seed=st.integers(0, 99))
def test_an_entry_is_kept_wherever_it_is_moved_to_and_nowhere_else(
    program: tuple[list[Tracked], list[Tracked]], seed: int
) -> None:
    leaves, made = program
    generator = torch.Generator().manual_seed(seed)
    free = dict.fromkeys(a for leaf in leaves for node in leaf.types for a in atoms(node) if not is_frozen(a))
    masks = {atom: torch.rand(atom.size, generator=generator) < 0.6 for atom in free}
    counts = {atom: int(mask.sum()) for atom, mask in masks.items()}
    is_kept = torch.cat([joint_mask(leaf, masks).flatten() for leaf in leaves])
    for tracked in made:
        assert torch.equal(joint_mask(tracked, masks), is_kept[tracked.labels])
        for node, size in zip(tracked.types, tracked.labels.shape, strict=True):
            assert find(node).size == size
            assert size_of(node, counts) == int(mask_of(node, masks).sum())


@settings(max_examples=100)
@given(program=programs(), seed=st.integers(0, 99))
def test_projection_sums_each_entry_into_the_index_that_removes_it(
    program: tuple[list[Tracked], list[Tracked]], seed: int
) -> None:
    _, made = program
    for tracked in made:
        for node in tracked.types:
            values = torch.rand(find(node).size, generator=torch.Generator().manual_seed(seed))
            for atom in dict.fromkeys(a for a in atoms(node) if not is_frozen(a)):
                if multiplies_itself(node, atom):
                    continue  # entry (i, i) of an n x n product belongs to index i twice
                found = project(values, node, atom)
                for index in range(atom.size):
                    without = torch.arange(atom.size) != index
                    removed = ~mask_of(node, {atom: without})
                    assert found[index] == pytest.approx(float(values[removed].sum()), abs=1e-5)


def multiplies_itself(node: Type, atom: Type) -> bool:
    node = find(node)
    within = [sum(a is atom for a in atoms(part)) > 0 for part in node.parts]
    return (node.kind == "product" and sum(within) > 1) or any(multiplies_itself(p, atom) for p in node.parts)


def test_heads_split_into_a_product_and_merge_again() -> None:
    width = Type(12)
    heads, head_dim = split_product(width, 3)
    assert repr(width) == "(3 x 4)"
    merged = product([heads, head_dim])
    masks = {find(head_dim): torch.tensor([True, False, True, True])}
    assert mask_of(merged, masks).tolist() == [True, False, True, True] * 3
    assert size_of(width, {find(heads): 2, find(head_dim): 3}) == 6


def test_a_packed_projection_is_cut_into_three() -> None:
    packed = Type(12)
    query, rest = cut(packed, 4)
    key, value = cut(rest, 4)
    unify(query, key)
    assert repr(packed) == "(4 + (4 + 4))"
    mask = torch.tensor([True, True, False, False])
    assert mask_of(packed, {find(query): mask}).tolist() == [*mask.tolist() * 2, *[True] * 4]
    assert not is_frozen(value)


def test_halves_that_are_turned_around_go_together() -> None:
    width = Type(8)
    first, second = cut(width, 4)
    unify(concatenation([second, first]), width)  # as rotary embeddings do
    assert find(first) is find(second)


def test_a_sum_under_a_product_is_shuffled_evenly() -> None:
    channels = concatenation([Type(4), Type(4)])
    outer, inner = split_product(channels, 2)
    shuffled = product([inner, outer])
    assert find(shuffled).size == 8 and not is_frozen(inner)
    assert find(channels).parts[0] is not None and is_frozen(outer)


@pytest.mark.parametrize(("first", "second"), [(Type(4), Type(6)), (product([Type(2), Type(3)]), Type(4))])
def test_sizes_that_differ_are_no_match(first: Type, second: Type) -> None:
    with pytest.raises(ConflictError, match="indices are not"):
        unify(first, second)


def test_crossing_boundaries_freeze_both_sides_with_the_reason() -> None:
    first, second = product([Type(2), Type(3)]), product([Type(3), Type(2)])
    unify(first, second)
    assert is_frozen(first) and is_frozen(second)
    assert {atom.reason for atom in atoms(first)} == {
        "no common structure: 3 indices are no 2 times anything"
    }


def test_freezing_reaches_all_that_was_unified_before_and_after() -> None:
    first, second, third = Type(6), Type(6), Type(6)
    unify(first, second)
    freeze(second, "model output")
    unify(third, first)
    assert is_frozen(first) and is_frozen(third) and find(third).reason == "model output"
    outer, inner = split_product(third, 2)
    assert find(outer).reason == find(inner).reason == "model output"


def test_a_size_of_one_is_broadcast_and_ties_nothing() -> None:
    wide, narrow = Type(5), Type(1)
    unify(wide, narrow)
    freeze(narrow, "external")
    assert not is_frozen(wide)


def test_a_cut_within_blocks_is_refused() -> None:
    blocks = product([Type(3), Type(2)])
    with pytest.raises(ConflictError, match="within blocks of 2"):
        cut(blocks, 3)
