"""The accuracy benchmark finds every method and composes each of its runs."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import MODEL_PRUNING, SETTINGS, composed, methods, model_pruning, summary


@pytest.fixture(scope="module")
def found() -> list[str]:
    return methods()


def test_all_recipes_that_remove_single_weights_take_part(found: list[str]) -> None:
    assert {"global_unstructured", "one_shot", "random", MODEL_PRUNING} <= set(found)
    assert not {"none", "global_structured", "heads", "n_of_m"} & set(found)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_run_is_composed(found: list[str], setting: str) -> None:
    for method in ["dense", *(found if setting == "mlp-mnist" else ["lottery_ticket", "rewinding"])]:
        cfg = composed(method, 0.95, setting, "data", None, seed=2)
        pruning = cfg.get("pruning") or cfg.callbacks.pruning if method != "dense" else {"sparsity": 0.95}
        assert pruning["sparsity"] == 0.95
        length, pruning = cfg.trainer.max_epochs, dict(pruning)
        total = length + pruning.get("num_levels", 0) * (length - pruning.get("epoch", 0))
        assert (total, cfg.seed) == (SETTINGS[setting][0], 2)


def test_the_increments_of_the_incumbent_compound_to_the_ramp() -> None:
    callback, kept = model_pruning(0.9, 10), 1.0
    for epoch in range(10):
        kept *= 1.0 - callback.amount(epoch)
        assert 1.0 - kept == pytest.approx(0.9 * (1 - (1 - min(1.0, (epoch + 1) / 7)) ** 3))


def test_the_table_has_mean_and_deviation_of_each_cell() -> None:
    row = {"setting": "mlp-mnist", "method": "a", "sparsity": 0.95}
    rows = [row | {"accuracy": value, "seed": seed} for seed, value in enumerate((97.0, 99.0))]
    assert "| a | 98.00 ± 1.41 |" in summary(
        [*rows, row | {"method": "dense", "sparsity": 0.0, "accuracy": 98.5}]
    )
