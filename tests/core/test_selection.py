"""Exact selection against a stable sort, for every float dtype and every awkward value."""

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.core import keys, sampling, selection
from lightning_prune.core.selection import keep_top, keep_top_rows
from lightning_prune.core.types import LazyScores

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
AWKWARD = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    1e-45,
    -1e-45,
    1e-310,
    1.0,
    -1.0,
    1.0 + 2**-7,
    3e38,
    -3e38,
    65504.0,
]


def by_sorting(scores, num_keep):
    """All scores in float64 (which holds each exactly), sorted by (-score, place); -0 becomes +0."""
    flat = np.concatenate([s.double().flatten().numpy() for s in scores.values()] or [np.empty(0)]) + 0.0
    expected = np.zeros(len(flat), dtype=bool)
    expected[np.argsort(-flat, kind="stable")[:num_keep]] = True
    return expected


def kept(masks):
    return np.concatenate([m.flatten().numpy() for m in masks.values()] or [np.empty(0, dtype=bool)])


values = st.one_of(st.sampled_from(AWKWARD), st.floats(-4, 4, width=16), st.integers(-2, 2).map(float))
tensors = st.lists(st.lists(values, max_size=12), min_size=1, max_size=4)


def test_scores_that_change_between_readings_are_refused():
    draw = torch.Generator().manual_seed(0)
    scores = LazyScores({"a": (1000,)}, lambda _: torch.rand(1000, generator=draw))
    with pytest.raises(ValueError, match="`scores` are the same each time they are read, but got others"):
        keep_top(scores, 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(rows=tensors, share=st.floats(0, 1))
@settings(max_examples=150)
def test_equals_a_stable_sort(dtype, rows, share):
    scores = {f"w{i}": torch.tensor(row, dtype=torch.float64).to(dtype) for i, row in enumerate(rows)}
    num_keep = round(share * sum(map(len, rows)))
    masks = keep_top(scores, num_keep)
    assert np.array_equal(kept(masks), by_sorting(scores, num_keep))
    assert all(m.dtype == torch.bool and m.shape == scores[n].shape for n, m in masks.items())


@given(rows=tensors, share=st.floats(0, 1), kinds=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4))
def test_dtypes_may_be_mixed(rows, share, kinds):
    scores = {f"w{i}": torch.tensor(row).to(kind) for i, (row, kind) in enumerate(zip(rows, kinds))}  # noqa: B905
    num_keep = round(share * sum(map(len, rows)))
    assert np.array_equal(kept(keep_top(scores, num_keep)), by_sorting(scores, num_keep))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.999])
def test_many_scores_in_several_chunks(dtype, density, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 1000)
    draw = torch.Generator().manual_seed(0)
    scores = {f"w{i}": torch.randn(37, 61, generator=draw).to(dtype) for i in range(4)}
    num_keep = round(density * 4 * 37 * 61)
    assert np.array_equal(kept(keep_top(scores, num_keep)), by_sorting(scores, num_keep))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.zeros(n),
        lambda n: torch.full((n,), -2.5),
        lambda n: torch.arange(n) % 7.0,
        lambda n: 1.0 + torch.arange(n) * 2.0**-23,
        lambda n: torch.arange(n) * 1e-45,
        lambda n: torch.tensor([math.inf, -math.inf, 0.0, -0.0])[torch.arange(n) % 4],
    ],
    ids=["zeros", "equal", "periodic", "neighbours", "subnormal", "infinite"],
)
def test_every_number_kept_of_awkward_sets(make):
    """Equal scores keep nothing or all elsewhere (llm-compressor, Torch-Pruning's global ties): here exactly k."""
    scores = {"a": make(40).float(), "b": make(23).float().view(-1, 1)}
    for num_keep in range(64):
        masks = keep_top(scores, num_keep)
        assert kept(masks).sum() == num_keep and np.array_equal(kept(masks), by_sorting(scores, num_keep))


def test_neighbouring_floats_are_told_apart():
    a = torch.tensor([1.0, 1.0 + 2**-23, 1.0 - 2**-24])
    assert keep_top({"a": a}, 1)["a"].tolist() == [False, True, False]
    b = torch.tensor([1.0, 1.0 + 2**-52, 1.0 - 2**-53], dtype=torch.float64)
    assert keep_top({"a": a, "b": b}, 2)["b"].tolist() == [False, True, False]


def test_strides_do_not_matter():
    scores = torch.randn(4, 6, 3, 3)
    expected = keep_top({"a": scores}, 50)["a"]
    for same in (
        scores.to(memory_format=torch.channels_last),
        scores.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(keep_top({"a": same}, 50)["a"], expected)


def counted(tensors):
    """Lazy scores, the list of names that were read, and how many other scores were still in memory at each reading."""
    reads, arrays, others = [], [], []

    def compute(name):
        reads.append(name)
        others.append(sum(array() is not None for array in arrays))
        array = tensors[name].view(torch.uint8).numpy().copy()
        arrays.append(weakref.ref(array))  # it lives as long as any tensor of its memory
        return torch.from_numpy(array).view(tensors[name].dtype)

    return LazyScores({name: tuple(t.shape) for name, t in tensors.items()}, compute), reads, others


def test_lazy_scores_are_read_three_times():
    """Once for a sample, once to count, once for the mask."""
    scores, reads, others = counted({"a": torch.arange(10.0), "b": torch.arange(10.0)})
    keep_top(scores, 7)
    assert reads == ["a", "b"] * 3 and not any(others)


@pytest.mark.parametrize(
    ("dtype", "num_reads"), [(torch.float32, 3), (torch.bfloat16, 3), (torch.float64, 5)], ids=str
)
def test_a_sample_is_as_good_as_all_scores(dtype, num_reads, monkeypatch):
    monkeypatch.setattr(sampling, "NUM_SAMPLES", 1 << 14)
    draw = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(100, 300, generator=draw).to(dtype) for i in range(10)}
    scores, reads, others = counted(tensors)
    masks = keep_top(scores, 30_000)
    assert np.array_equal(kept(masks), by_sorting(tensors, 30_000))
    assert len(reads) == 10 * num_reads and not any(others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampled", [3.0, -3.0, 0.0, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_sample_that_misleads_costs_reads_only(dtype, sampled, share, monkeypatch):
    """Every score that the sample sees is the same, and the others are above, below or on both sides of it."""
    monkeypatch.setattr(sampling, "NUM_SAMPLES", 100)
    values = torch.randn(6000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[::60] = sampled
    scores, reads, _ = counted({"a": values[:2011].clone(), "b": values[2011:].clone()})
    num_keep = round(share * 6000)
    masks = keep_top(scores, num_keep)
    assert np.array_equal(kept(masks), by_sorting({"all": values}, num_keep))
    assert len(reads) <= 2 * (8 if dtype == torch.float64 else 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    rows=tensors,
    share=st.floats(0, 1),
    repeat=st.integers(1, 9),
    num_samples=st.integers(1, 9),
    bits=st.integers(1, 20),
)
@settings(max_examples=100)
def test_any_sample_and_any_number_of_bins_give_the_same(dtype, rows, share, repeat, num_samples, bits):
    scores = {
        f"w{i}": torch.tensor(row * repeat, dtype=torch.float64).to(dtype) for i, row in enumerate(rows)
    }
    num_keep = round(share * repeat * sum(map(len, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "NUM_SAMPLES", num_samples)
        patch.setattr(sampling, "MARGIN", 0.5)
        patch.setattr(selection, "CHUNK", 7)
        patch.setattr(keys, "BIN_BITS", bits)
        masks = keep_top(scores, num_keep)
    assert np.array_equal(kept(masks), by_sorting(scores, num_keep))


def test_nothing_and_everything():
    scores = {"a": torch.randn(3, 2), "empty": torch.empty(0, 4), "scalar": torch.tensor(1.0)}
    assert not kept(keep_top(scores, 0)).any() and kept(keep_top(scores, 7)).all()
    assert kept(keep_top({}, 0)).size == 0
    assert keep_top(scores, 1)["empty"].shape == (0, 4) and keep_top(scores, 1)["scalar"].shape == ()


@pytest.mark.parametrize("num_keep", [0, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_an_error_that_names_the_parameter(num_keep, dtype):
    scores = {
        "a": torch.ones(3, dtype=dtype),
        "net.0.weight": torch.tensor([[1.0, math.nan, math.inf]], dtype=dtype),
    }
    with pytest.raises(
        ValueError, match=r"`net.0.weight` has scores that can be ranked, but got 1 NaN in shape \(1, 3\)"
    ):
        keep_top(scores, num_keep)


@pytest.mark.parametrize("num_keep", [-1, 5])
def test_a_number_out_of_range_is_an_error(num_keep):
    with pytest.raises(
        ValueError, match=rf"`num_keep` is a number of scores, in \[0, 4\], but got {num_keep}"
    ):
        keep_top({"a": torch.ones(4)}, num_keep)
    with pytest.raises(
        ValueError, match=rf"`num_keep` is a number of columns, in \[0, 4\], but got {num_keep}"
    ):
        keep_top_rows(torch.ones(2, 4), num_keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(rows=st.integers(0, 5), columns=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 50))
def test_rows_equal_a_stable_sort_of_each(dtype, rows, columns, share, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.tensor(AWKWARD, dtype=torch.float64)[
        torch.randint(0, len(AWKWARD), (rows, columns), generator=draw)
    ]
    scores, num_keep = scores.to(dtype), round(share * columns)
    mask = keep_top_rows(scores, num_keep)
    for row, marks in zip(scores, mask, strict=True):
        assert np.array_equal(marks.numpy(), by_sorting({"row": row}, num_keep))


def test_rows_in_several_chunks(monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 10)
    scores = torch.randn(13, 4)
    assert torch.equal(keep_top_rows(scores, 2).sum(1), torch.full((13,), 2))
