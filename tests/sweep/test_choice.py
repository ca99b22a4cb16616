from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.sweep import group_rows, pareto_front, recommend
from lightning_prune.sweep.choice import sizes_in

ROWS = st.lists(
    st.fixed_dictionaries(
        {"acc": st.floats(0, 1).map(lambda x: round(x, 2)), "params": st.integers(1, 30).map(float)}
    ),
    min_size=1,
    max_size=12,
)


def beats(one, other):
    at_least = one["acc"] >= other["acc"] and one["params"] <= other["params"]
    return at_least and (one["acc"], one["params"]) != (other["acc"], other["params"])


@given(ROWS)
def test_the_front_holds_what_no_other_beats(rows):
    front = pareto_front(rows, "acc", "params")
    unbeaten = {(row["acc"], row["params"]) for row in rows if not any(beats(other, row) for other in rows)}
    assert [(row["acc"], row["params"]) for row in front] == sorted(unbeaten, key=lambda point: point[1])


@given(ROWS, st.floats(0, 0.5))
def test_the_recommended_one_is_the_smallest_within_the_tolerance(rows, tolerance):
    rows = [{**row, "sparsity": 0.5} for row in rows]
    chosen = recommend(rows, "acc", "params", tolerance)
    best = max(row["acc"] for row in rows)
    good = [row for row in rows if row["acc"] >= best - tolerance]
    assert chosen.is_within and chosen.baseline == best
    assert chosen.row["params"] == min(row["params"] for row in good)
    assert chosen.row["acc"] == max(row["acc"] for row in good if row["params"] == chosen.row["params"])


def row(acc, params, sparsity=0.5, **more):
    return {"val/acc": acc, "params": params, "sparsity": sparsity, **more}


def test_less_of_an_error_is_better_whatever_it_is_called():
    """A name that does not tell is asked for, never guessed: the worst model was recommended so."""
    rows = [{"val_mse": 0.011, "nonzeros": 9.0, "sparsity": 0.0}, {"val_mse": 0.01105, "nonzeros": 5.0}]
    rows.append({"val_mse": 0.38, "nonzeros": 1.0})
    assert recommend(rows, "val_mse").row["nonzeros"] == 5.0
    unknown = [{"elegance": row["val_mse"], **row} for row in rows]
    with pytest.raises(ValueError, match="`mode` is 'min' or 'max', what is better of 'elegance'"):
        recommend(unknown, "elegance")
    assert recommend(unknown, "elegance", mode="min").row["nonzeros"] == 5.0
    assert recommend(unknown, "elegance", mode="max").row["nonzeros"] == 1.0


def test_what_may_be_lost_of_a_negative_log_likelihood_makes_it_larger():
    """It can lie below zero, where a hundredth more of it would be less."""
    rows = [{"nll": -2.0, "params": 9.0, "sparsity": 0.0}, {"nll": -1.99, "params": 5.0}]
    assert recommend([*rows, {"nll": -1.9, "params": 1.0}], "nll").row["params"] == 5.0


def test_the_dense_model_is_the_baseline_and_not_the_choice():
    rows = [row(0.90, 100.0, 0.0), row(0.95, 80.0), row(0.895, 20.0), row(0.5, 1.0)]
    chosen = recommend(rows)
    assert (chosen.baseline, chosen.row["params"]) == (0.90, 20.0)
    assert "within 0.01 of the dense model's, 0.9" in chosen.rule


def test_what_was_measured_before_pruning_is_the_baseline_where_no_dense_model_ran():
    rows = [row(0.90, 50.0, **{"dense/val/acc": 0.99}), row(0.95, 80.0, **{"dense/val/acc": 0.99})]
    chosen = recommend(rows, tolerance=0.05)
    assert (chosen.baseline, chosen.row["params"]) == (0.99, 80.0)
    assert "of that before pruning" in chosen.rule


def test_of_a_loss_the_tolerance_is_a_fraction():
    rows = [
        {"val/loss": loss, "params": size, "sparsity": s}
        for loss, size, s in ((2.0, 9.0, 0.0), (2.1, 3.0, 0.5))
    ]
    assert not recommend(rows, tolerance=0.04).is_within
    assert recommend(rows, tolerance=0.06).row["params"] == 3.0


def test_if_none_is_good_enough_it_is_the_knee():
    rows = [row(0.99, 1000.0, 0.0), row(0.90, 100.0), row(0.89, 10.0), row(0.3, 1.0)]
    chosen = recommend(rows)
    assert not chosen.is_within
    assert chosen.row["params"] == 10.0
    assert chosen.rule.startswith("the knee of the front, since no pruned model's val/acc is within 0.01")


def test_what_is_no_number_is_never_chosen():
    rows = [row(math.nan, 1.0), row(0.9, math.inf), row(0.8, 10.0), row(0.7, 5.0)]
    assert recommend(rows, "val/acc", "params").row["params"] == 10.0
    assert recommend([{"val/acc": 0.5, "params": 3.0}]) is None  # one size: nothing to choose from
    assert recommend([]) is None


def test_unknown_columns_and_negative_tolerances_are_refused():
    with pytest.raises(ValueError, match="`metric` is one of .*val/acc.*, but got 'acc'"):
        recommend([row(0.9, 1.0)], "acc")
    with pytest.raises(ValueError, match="`tolerance` is 0 or more, but got -1"):
        recommend([row(0.9, 1.0)], tolerance=-1)


def test_latencies_within_noise_are_no_measure_of_size():
    def timed(low, high):
        return row(0.9, 1.0, latency_ms=(low + high) / 2, latency_low_ms=low, latency_high_ms=high)

    assert sizes_in([timed(1.0, 3.0), timed(2.0, 4.0)]) == []
    assert sizes_in([timed(1.0, 1.5), timed(2.0, 4.0)]) == ["latency_ms"]


def test_means_and_deviations_are_those_of_numpy():
    import numpy as np

    values = [0.91, 0.85, 0.95]
    jobs = [
        {"job": str(i), "lr": "1", "seed": str(i), "val/acc": v, "status": "done"}
        for i, v in enumerate(values)
    ]
    (group,) = group_rows([*jobs, {"job": "9", "lr": "1", "seed": "9", "status": "failed", "error": "x"}])
    assert group["val/acc"] == pytest.approx(np.mean(values))
    assert group["val/acc sd"] == pytest.approx(np.std(values, ddof=1))
    assert (group["jobs"], group["num_jobs"], group["lr"]) == ("0 1 2", 3, "1")
    assert [g["num_jobs"] for g in group_rows(jobs, seeds=())] == [1, 1, 1]
