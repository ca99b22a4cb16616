"""Laws of every schedule, and values that were computed by hand or by another formula."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import (
    Alternating,
    Constant,
    Cosine,
    Exponential,
    Join,
    Linear,
    OneCycle,
    Polynomial,
    Steps,
)
from tests.members import members

SCHEDULES = members("schedule")
progress = st.floats(0.0, 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedule_ends_at_the_target(schedule):
    assert schedule(1.0) == pytest.approx(1.0, abs=1e-12) and schedule(1) == schedule(1.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@given(p=progress)
def test_schedule_is_a_fraction_and_pure(schedule, p):
    assert 0.0 <= schedule(p) <= 1.0
    assert schedule(p) == schedule(p)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if not isinstance(s, Alternating)], ids=str)
@given(p=progress, q=progress)
def test_schedule_never_falls(schedule, p, q):
    low, high = sorted((p, q))
    assert schedule(low) <= schedule(high) + 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf])
def test_schedule_refuses_progress_outside_of_the_window(schedule, bad):
    with pytest.raises(ValueError, match=r"`progress` is a fraction in \[0, 1\], but got"):
        schedule(bad)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedule_is_frozen_and_comparable(schedule):
    assert schedule == type(schedule)(**{f: getattr(schedule, f) for f in schedule.__dataclass_fields__})
    assert hash(schedule) == hash(schedule)


@given(p=progress)
def test_polynomial_is_equation_1_of_zhu_and_gupta(p):
    initial, final, steps = 0.0, 0.9, 1000.0
    expected = final + (initial - final) * (1 - p * steps / steps) ** 3
    assert final * Polynomial()(p) == pytest.approx(expected, abs=1e-12)


@given(p=progress)
def test_linear_is_the_first_power(p):
    assert Linear()(p) == pytest.approx(Polynomial(power=1.0)(p), abs=1e-12)


def test_cosine_against_numpy():
    p = np.linspace(0, 1, 11)
    np.testing.assert_allclose([Cosine()(x) for x in p], (1 - np.cos(np.pi * p)) / 2, atol=1e-12)


def test_exponential_against_numpy():
    p = np.linspace(0, 1, 11)
    np.testing.assert_allclose(
        [Exponential(3.0)(x) for x in p], (1 - np.exp(-3 * p)) / (1 - np.exp(-3)), atol=1e-12
    )


def test_one_cycle_against_the_paper_rescaled():
    p = np.linspace(0, 1, 11)
    paper = (1 + np.exp(-14 + 5)) / (1 + np.exp(-14 * p + 5))
    np.testing.assert_allclose(
        [OneCycle()(x) for x in p], (paper - paper[0]) / (paper[-1] - paper[0]), atol=1e-12
    )


def test_steps_jump_at_once_and_at_the_end():
    assert [Steps(num_steps=4)(p) for p in (0.0, 0.3, 1 / 3, 0.5, 2 / 3, 0.99, 1.0)] == [
        0.25,
        0.25,
        0.5,
        0.5,
        0.75,
        0.75,
        1.0,
    ]
    assert Steps(num_steps=1)(0.0) == 1.0 == Constant()(0.0)


def test_alternating_ends_sparse_whatever_the_number_of_phases():
    assert [Alternating(num_phases=3)(p) for p in (0.0, 0.4, 0.7, 1.0)] == [1.0, 0.0, 1.0, 1.0]
    assert [Alternating(num_phases=2)(p) for p in (0.0, 0.4, 0.6, 1.0)] == [0.0, 0.0, 1.0, 1.0]


def test_join_climbs_through_its_levels():
    join = Join(schedules=(Linear(), Constant(), Linear()), boundaries=(0.2, 0.6), levels=(0.5, 0.7))
    assert [join(p) for p in (0.0, 0.1, 0.2, 0.5, 0.6, 0.8, 1.0)] == pytest.approx(
        [0.0, 0.25, 0.7, 0.7, 0.7, 0.85, 1.0]
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Polynomial(power=0), r"`power` is a number above 0, but got 0\."),
        (lambda: Polynomial(power="3"), r"`power` is .* but got '3'"),
        (lambda: Exponential(steepness=0.0), r"`steepness` is a number in \[-100, 100\] other than 0"),
        (lambda: OneCycle(alpha=-1), r"`alpha` is a number in \(0, 100\], but got -1"),
        (lambda: OneCycle(beta=math.inf), r"`beta` is a number"),
        (lambda: Steps(num_steps=0), r"`num_steps` is a whole number of at least 1, but got 0"),
        (lambda: Steps(num_steps=2.5), r"`num_steps` is a whole number of at least 1, but got 2.5"),
        (lambda: Alternating(num_phases=True), r"`num_phases` is a whole number"),
        (lambda: Join(schedules=()), r"`boundaries` and `levels` have one entry fewer than `schedules`"),
        (
            lambda: Join(schedules=(Linear(), Linear()), boundaries=(1.0,), levels=(0.5,)),
            r"`boundaries` rise",
        ),
        (
            lambda: Join(schedules=(Linear(), Linear()), boundaries=(0.5,), levels=(1.5,)),
            r"`levels` is a fraction",
        ),
    ],
)
def test_settings_out_of_range_are_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()
