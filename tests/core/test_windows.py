import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import Linear, Polynomial, Window
from lightning_prune.core.ramp import Ramp
from lightning_prune.core.windows import StepWindow


@given(start=st.integers(0, 50), length=st.integers(0, 80), every=st.integers(1, 100))
def test_the_last_update_lands_exactly_on_the_end(start, length, every):
    """tfmot and JaxPruner test `step % frequency == 0` and never reach an end off the grid."""
    window = StepWindow(start, start + length, every)
    fired = [step for step in range(start + length + 20) if window.fires(step)]
    assert fired[-1] == window.end and window.progress(fired[-1]) == 1.0
    assert fired[0] == window.start
    assert all((step - start) % every == 0 for step in fired[:-1])


@given(start=st.integers(0, 20), length=st.integers(1, 50))
def test_progress_runs_from_zero_to_one(start, length):
    window = StepWindow(start, start + length, 1)
    steps = range(start + length + 5)
    assert [window.progress(s) for s in steps] == [min(1.0, max(0.0, (s - start) / length)) for s in steps]


@given(num_steps=st.integers(1, 10_000), end=st.floats(0.0, 1.0), every=st.floats(1e-6, 1.0))
def test_fractions_of_the_run_become_steps_within_it(num_steps, end, every):
    window = Window(0.0, end, every).resolve(num_steps, steps_per_epoch=num_steps)
    assert 0 <= window.end <= num_steps and window.every >= 1
    assert abs(window.end - end * num_steps) <= 0.5


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(0.1, 0.7, 0.1), StepWindow(100, 700, 100)),
        (Window(1, 3.5, 0.5, unit="epochs"), StepWindow(50, 175, 25)),
        (Window(3, 17, 4, unit="steps"), StepWindow(3, 17, 4)),
        (Window(), StepWindow(0, 700, 10)),
        (Window(0.0, 1.0, 1e-9), StepWindow(0, 1000, 1)),
    ],
)
def test_units(window, expected):
    assert window.resolve(num_steps=1000, steps_per_epoch=50) == expected


@pytest.mark.parametrize("unknown", [math.inf, -1])
def test_unknown_length_is_refused_with_advice(unknown):
    with pytest.raises(ValueError, match=r"fractions of the run.*set `max_steps`.*unit='steps'"):
        Window().resolve(unknown, unknown)
    with pytest.raises(ValueError, match="epochs"):
        Window(0, 1, 1, unit="epochs").resolve(unknown, unknown)
    assert Window(0, 100, 10, unit="steps").resolve(unknown, unknown) == StepWindow(0, 100, 10)


def test_a_window_that_ends_after_the_run_is_refused():
    with pytest.raises(ValueError, match="ends at optimizer step 200, but the run has 100 steps"):
        Window(0, 200, 10, unit="steps").resolve(100, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.5, "end": 0.4}, r"`end` is not before `start`"),
        ({"start": -0.1}, r"`start` is a fraction of the run in \[0, 1\]"),
        ({"end": 1.5}, r"`end` is a fraction of the run in \[0, 1\]"),
        ({"every": 0}, r"`every` is a number above 0"),
        (
            {"unit": "step"},
            r"`unit` is one of \['run', 'epochs', 'steps'\], but got 'step'. Did you mean steps\?",
        ),
        ({"start": 0, "end": 2.5, "every": 1, "unit": "steps"}, r"whole numbers of steps"),
        ({"end": math.nan}, r"`end` is a number"),
    ],
)
def test_bad_windows_are_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        Window(**settings)


@given(skipped=st.sets(st.integers(1, 30)))
def test_an_update_on_a_skipped_step_is_done_on_the_next(skipped):
    """With mixed precision a step may be skipped: no update is lost, and the last fraction is 1."""
    ramp, done = Ramp(Linear(), StepWindow(0, 30, 7)), []
    for step in range(1, 41):
        ramp.tick()
        if ramp.is_due and step not in skipped:
            done.append(ramp.fraction)
            ramp.is_due = False
    assert done[-1] == 1.0 and done == sorted(done) and ramp.is_over


def test_a_window_of_one_step_has_a_progress_before_it():
    assert [StepWindow(8, 8, 1).progress(step) for step in (0, 7, 8, 9)] == [0.0, 0.0, 1.0, 1.0]


def test_ramp_state_round_trip():
    ramp, other = (Ramp(Polynomial(), StepWindow(0, 10, 3)) for _ in range(2))
    for _ in range(4):
        ramp.tick()
    ramp.is_due = False
    other.load_state_dict(ramp.state_dict())
    assert other == ramp and other.num_steps == 4


def test_a_schedule_that_leaves_its_range_is_refused():
    with pytest.raises(
        ValueError, match=r"`schedule` is a curve in \[0, 1\], at progress 0.5 too, but got 2.0"
    ):
        _ = Ramp(lambda p: 2.0, StepWindow(0, 2, 1), num_steps=1).fraction
