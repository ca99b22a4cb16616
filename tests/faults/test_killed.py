"""Runs that are ended at a random moment go on bit for bit; `python -m benchmarks.faults` does it for every recipe."""

import logging

import pytest

from benchmarks.faults import TRIALS, Trial, whole_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("recipe", ["gradual", "rigl", "global_structured", "lottery_ticket", "wanda"])
def test_it_ends_as_the_whole_run_or_says_why_it_cannot(recipe):
    whole = whole_run(recipe)
    for kind in TRIALS:
        outcome, said = Trial(recipe, 1, whole).run(kind)
        expected = {"refused", "as the whole"} if kind in ("cut off", "flipped bits") else {"as the whole"}
        assert outcome in expected, (kind, said)
