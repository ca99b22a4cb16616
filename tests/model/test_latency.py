"""Where a median surely lies, against the binomial distribution itself."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binom

from lightning_prune.model import latency
from lightning_prune.model.latency import median_interval


@pytest.mark.parametrize("n", [6, 7, 10, 40, 41, 200, 999, 1000, 2500])
def test_the_interval_is_that_of_order_statistics(n):
    low, high = median_interval([float(i) for i in range(1, n + 1)])
    assert high == n + 1 - low
    rank = int(low)
    assert binom.cdf(rank - 1, n, 0.5) <= 0.025 * 1.02  # the normal law stands in for large n
    assert binom.cdf(rank, n, 0.5) > 0.025 * 0.98  # and no narrower one would do


def test_it_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [median_interval(rng.exponential(size=25).tolist()) for _ in range(2000)]
    hits = [low <= np.log(2.0) <= high for low, high in found]
    assert 0.94 < np.mean(hits) < 0.99


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 5])
def test_too_few_values_tell_nothing(values):
    assert median_interval(values) is None


class Scripted:
    """A timer that says what it is told."""

    def __init__(self, milliseconds):
        self.times, self.rounds = milliseconds, 0

    def blocked_autorange(self, min_run_time):
        self.rounds += 1
        return SimpleNamespace(median=next(self.times))


@pytest.mark.parametrize(
    ("spread", "rounds"), [(0.0, latency.NUM_ROUNDS), (0.2, latency.MAX_ROUNDS)], ids=["quiet", "busy"]
)
def test_a_ratio_takes_as_many_rounds_as_it_needs(spread, rounds, monkeypatch):
    rng = np.random.default_rng(0)
    timers = [Scripted(itertools.repeat(2.0)), Scripted(1.2 + spread * rng.standard_normal(99).clip(-3, 3))]
    timers[1].times = iter(timers[1].times)
    given = iter(timers)
    monkeypatch.setattr(latency, "_timer", lambda call: next(given))
    found = latency.latency_ratio(None, None, precision=0.01)
    assert [timer.rounds for timer in timers] == [rounds, rounds]
    assert found == pytest.approx(0.6, abs=0.02 if spread else 1e-12)
