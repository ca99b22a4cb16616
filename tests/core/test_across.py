"""Selection over parts: what each process keeps of its rows is what one process keeps of all of them."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import ERK, Fixed, Global, Isomorphic, Local, NofM, PerRow
from lightning_prune.core import sampling
from lightning_prune.core.selection import keep_top
from lightning_prune.core.types import BY_ROWS, LazyScores

SCOPES = [
    Global(),
    Global(min_keep=0.2),
    Global(min_keep=3),
    Local(),
    Isomorphic(),
    ERK(),
    Fixed({"w1": 0.25, "*": 0.6}),
    PerRow(),
    NofM(1, 2),
]


class Threads:
    """Processes that are threads: each waits for all others wherever they put something together."""

    def __init__(self, num: int) -> None:
        self.barrier, self.rows = threading.Barrier(num, timeout=20), [torch.empty(0)] * num
        self.num_sent = [0] * num

    def of(self, rank):
        return Member(self, rank)


class Member:
    def __init__(self, threads, rank):
        self.threads, self.rank = threads, rank

    def collect(self, counts):
        self.threads.rows[self.rank] = counts
        self.threads.num_sent[self.rank] += counts.numel()
        self.threads.barrier.wait()
        found = torch.stack(self.threads.rows)
        self.threads.barrier.wait()
        return found

    def sum(self, counts):
        return self.collect(counts).sum(0)


def on_parts(choose, scores, cuts):
    """Run `choose` on the rows of each process, and put the masks together; the sizes of what was sent, too."""
    threads = Threads(len(cuts) + 1)

    def run(rank):
        parts = {n: t.tensor_split(bounds(cuts, len(t)))[rank] for n, t in scores.items()}
        shapes = {name: tuple(t.shape) for name, t in scores.items()}
        try:
            return choose(LazyScores(shapes, parts.__getitem__, threads.of(rank)))
        except Exception:
            threads.barrier.abort()
            raise

    with ThreadPoolExecutor(len(cuts) + 1) as pool:
        found = list(pool.map(run, range(len(cuts) + 1)))
    return {name: torch.cat([masks[name] for masks in found]) for name in scores}, threads.num_sent


def bounds(cuts, num_rows):
    return sorted(round(cut * num_rows) for cut in cuts)


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[n], m) for n, m in expected.items())


values = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf, -math.inf]), st.floats(-4, 4, width=16))
shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=3)
cuts = st.lists(st.floats(0, 1), min_size=1, max_size=3)


@given(shapes=shapes, cuts=cuts, share=st.floats(0, 1), data=st.data())
@settings(max_examples=60)
def test_parts_keep_what_the_whole_keeps(shapes, cuts, share, data):
    """Ties too, and processes without a row."""
    scores = {
        f"w{i}": torch.tensor(data.draw(st.lists(values, min_size=a * b, max_size=a * b))).view(a, b)
        for i, (a, b) in enumerate(shapes)
    }
    num_keep = round(share * sum(t.numel() for t in scores.values()))
    found, _ = on_parts(lambda some: keep_top(some, num_keep), scores, cuts)
    assert same(found, keep_top(scores, num_keep))


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("cuts", [[0.5], [0.0, 0.3, 0.9]], ids=str)
def test_scopes_by_rows(scope, sparsity, cuts):
    assert getattr(scope, BY_ROWS)
    draw = torch.Generator().manual_seed(0)
    sizes = {"w1": (5, 4), "w2": (7, 6), "x": (3, 2)}
    scores = {n: torch.randint(0, 9, size, generator=draw).float() for n, size in sizes.items()}
    found, _ = on_parts(lambda some: scope(some, sparsity), scores, cuts)
    assert same(found, scope(scores, sparsity))


def test_histograms_are_sent_and_no_scores(monkeypatch):
    """A sample guesses the bracket, as for one process; what is sent does not grow with the scores."""
    monkeypatch.setattr(sampling, "NUM_SAMPLES", 1 << 10)
    draw = torch.Generator().manual_seed(0)
    sent = []
    for num_rows in (400, 1600):
        scores = {
            "a": torch.randn(num_rows, 100, generator=draw),
            "b": torch.randn(num_rows, 100, generator=draw) * 3,
        }
        num_keep = scores["a"].numel() // 5
        found, num_sent = on_parts(lambda some, k=num_keep: keep_top(some, k), scores, [0.5])
        assert same(found, keep_top(scores, num_keep))
        sent.append(max(num_sent))
    assert sent[1] < 1.5 * sent[0]


def test_nan_on_one_process_is_refused_on_all():
    scores = {"a": torch.ones(4, 3), "b": torch.tensor([[1.0], [2.0], [math.nan], [3.0]])}

    def choose(some):
        with pytest.raises(
            ValueError, match=r"`b` has scores that can be ranked, but got 1 NaN in shape \(4, 1\)"
        ):
            keep_top(some, 5)
        return {name: torch.ones(1, dtype=torch.bool) for name in some}

    found, _ = on_parts(choose, scores, [0.5])
    assert len(found["a"]) == 2
