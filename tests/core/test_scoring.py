"""Scores that are read a few rows at a time are those of the whole, and what they cost in memory does not grow."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune import Global, Kernel, Magnitude, Movement, Random, Saliency, Slice, Weight
from lightning_prune.core import scoring, selection
from lightning_prune.core.scoring import group_scores, without_pruned
from lightning_prune.core.selection import keep_top
from lightning_prune.core.types import LazyScores, some_of

CRITERIA = {
    "magnitude": (Magnitude(), ("weight",)),
    "squares": (Magnitude(p=2), ("weight",)),
    "saliency": (Saliency(), ("weight", "grad")),
    "movement": (Movement(), ("movement",)),
    "random": (Random(3), ("weight", "name")),
}
SHAPES = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3).map(
    lambda found: {f"layer{i}": shape for i, shape in enumerate(found)}
)


def stats_of(shapes, names, seed):
    draw = torch.Generator().manual_seed(seed)
    kinds = {
        name: {k: torch.randn(shape, generator=draw) for k in names if k != "name"}
        for name, shape in shapes.items()
    }
    return {name: found | ({"name": name} if "name" in names else {}) for name, found in kinds.items()}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(scoring, "PIECE", 8)
    monkeypatch.setattr(selection, "CHUNK", 5)


@given(shapes=SHAPES, kind=st.sampled_from(sorted(CRITERIA)), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_piece_by_piece_is_the_whole(shapes, kind, seed, share):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "PIECE", 8)
        criterion, names = CRITERIA[kind]
        stats = stats_of(shapes, names, seed)
        scores = group_scores(stats, shapes, criterion=criterion, granularity=Weight())
        masks = {
            n: torch.rand(s, generator=torch.Generator().manual_seed(seed)) < 0.7 for n, s in shapes.items()
        }
        masks.popitem()
        for found in (scores, without_pruned(scores, masks, Weight()), some_of(scores, *shapes)):
            for name, shape in shapes.items():
                whole = found[name]
                pieces = list(found.pieces(name))
                assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), whole.reshape(-1))
                assert len(pieces) == 1 or all(
                    piece.numel() <= max(8, math.prod(shape[1:])) for piece in pieces
                )
        total = sum(map(math.prod, shapes.values()))
        eager = {name: scores[name] for name in shapes}
        some, all_at_once = keep_top(scores, round(share * total)), keep_top(eager, round(share * total))
        assert all(torch.equal(some[name], all_at_once[name]) for name in shapes)


@pytest.mark.parametrize("granularity", [Slice(0), Slice(1), Kernel()], ids=str)
def test_groups_within_rows_are_read_by_rows_and_others_as_a_whole(granularity, small_pieces):
    shapes = {"a": (6, 4, 3, 3), "b": (5, 2, 3, 3)}
    scores = group_scores(
        stats_of(shapes, ("weight",), 0), shapes, criterion=Magnitude(), granularity=granularity
    )
    for name in shapes:
        pieces = list(scores.pieces(name))
        assert (len(pieces) > 1) == bool(getattr(granularity, "by_rows", False))
        torch.testing.assert_close(torch.cat(pieces), scores[name])
        masks = {name: torch.rand(shapes[name]) < 0.5}
        hidden = without_pruned(scores, masks, granularity)
        torch.testing.assert_close(torch.cat(list(hidden.pieces(name))), hidden[name])


def test_a_criterion_that_looks_beyond_a_row_sees_the_whole():
    @dataclasses.dataclass(frozen=True)
    class OfTheLayer:
        def __call__(self, *, weight):
            return weight / weight.sum()

    shapes = {"a": (2**10, 2**10)}
    scores = group_scores(
        stats_of(shapes, ("weight",), 0), shapes, criterion=OfTheLayer(), granularity=Weight()
    )
    assert len(list(scores.pieces("a"))) == 1


def test_a_row_of_another_shape_is_refused_as_a_whole_is(small_pieces):
    @dataclasses.dataclass(frozen=True)
    class Wrong:
        by_rows = True

        def __call__(self, *, weight):
            return weight[:, :1]

    scores = group_scores(
        {"a": {"weight": torch.randn(6, 4)}}, {"a": (6, 4)}, criterion=Wrong(), granularity=Weight()
    )
    with pytest.raises(ValueError, match=r"scores of the weight's shape, .2, 4. for `a`"):
        list(scores.pieces("a"))


class Largest(TorchDispatchMode):
    """Bytes and dtypes of the tensors that are made inside."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        is_real = isinstance(found, torch.Tensor) and found.device.type != "meta"
        if is_real and found.untyped_storage().data_ptr() not in known:
            self.made.append((found.numel() * found.element_size(), found.dtype))
        return found


@pytest.mark.parametrize("rows", [2**10, 2**13])
def test_memory_beside_the_masks_does_not_grow_with_the_model(rows, monkeypatch):
    monkeypatch.setattr(selection.sampling, "NUM_SAMPLES", 1 << 10)
    shapes = {"a": (rows, 512), "b": (rows, 512)}
    stats = stats_of(shapes, ("weight",), 0)
    with Largest() as seen:
        scores = group_scores(stats, shapes, criterion=Magnitude(), granularity=Weight())
        Global()(scores, 0.9)
    masks = [size for size, dtype in seen.made if dtype == torch.bool and size == rows * 512]
    others = [size for size, dtype in seen.made if not (dtype == torch.bool and size == rows * 512)]
    assert len(masks) == 2 and max(others) <= 8 * ((1 << 20) + 1)  # a histogram


def test_sharded_scores_come_in_one_piece():
    class Across:
        rank = 0

    def pieces(name):
        raise AssertionError("their shape is that of the part")

    found = LazyScores({"a": (4, 2)}, lambda name: torch.ones(2, 2), Across(), pieces)
    assert [piece.shape for piece in found.pieces("a")] == [(2, 2)]
