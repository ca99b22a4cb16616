"""The accuracy benchmark finds every method and composes each of its runs."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks.accuracy import SETTINGS, Run, main, methods
from benchmarks.accuracy_others import BLOCKS, CHANNELS, OTHERS, PATTERN, ROWS, others
from benchmarks.accuracy_runs import ROOT, SMALL, TELLING, composed, model_pruning
from benchmarks.accuracy_tables import (
    AT_RANDOM,
    BEGIN,
    END,
    EXPECTED,
    MODEL_PRUNING,
    README,
    orders,
    placed,
    summary,
)
from benchmarks.record import RESULTS


@pytest.fixture(scope="module")
def found() -> list[str]:
    return methods()


def test_all_recipes_that_remove_single_weights_take_part(found: list[str]) -> None:
    assert {"global_unstructured", "one_shot", AT_RANDOM, "random", MODEL_PRUNING} <= set(found)
    assert not {"none", *OTHERS} & set(found)
    recipes = {path.stem for path in (ROOT / "conf" / "pruning").glob("*.yaml")}
    assert recipes - {*found, *OTHERS} == {"none", "gradual", "latency_budget"}  # the last goes by the clock
    assert set(TELLING) <= set(found) and {name for pair in EXPECTED for name in pair} <= set(TELLING)
    assert set(SMALL) <= set(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_run_is_composed(found: list[str], setting: str) -> None:
    for method in ["dense", *(found if setting == "mlp-mnist" else ["lottery_ticket", "rewinding"])]:
        cfg = composed(Run(setting, method, 0.95, seed=2))
        pruning = cfg.get("pruning") or cfg.callbacks.pruning if method != "dense" else {"sparsity": 0.95}
        assert pruning["sparsity"] == 0.95
        length, pruning = cfg.trainer.max_epochs, dict(pruning)
        total = length + pruning.get("num_levels", 0) * (length - pruning.get("epoch", 0))
        assert (total, cfg.seed) == (SETTINGS[setting].epochs, 2)


@pytest.mark.parametrize("setting", SMALL)
def test_what_is_beside_the_grid_is_composed(setting: str) -> None:
    for method in others(setting):
        cfg = composed(Run(setting, method, 0.5, seed=2))
        half = {PATTERN: (None, None), CHANNELS: (None, 0.5)}.get(OTHERS[method][0], (0.5, None))
        assert OTHERS[method][0] in (PATTERN, CHANNELS, ROWS, BLOCKS)
        assert (cfg.pruning.sparsity, (cfg.pruning.get("budget") or {}).get("macs")) == half
        assert cfg.trainer.max_epochs == SETTINGS[setting].epochs
    assert {m for at in SMALL for m in others(at)} == set(OTHERS)


def test_the_increments_of_the_incumbent_compound_to_the_ramp() -> None:
    callback, kept = model_pruning(0.9, 10), 1.0
    for epoch in range(10):
        kept *= 1.0 - callback.amount(epoch)
        assert 1.0 - kept == pytest.approx(0.9 * (1 - (1 - min(1.0, (epoch + 1) / 7)) ** 3))


def test_the_table_has_mean_and_deviation_of_each_cell_and_the_best_first() -> None:
    row = {"setting": "mlp-mnist", "method": "a", "sparsity": 0.95}
    rows = [row | {"test/acc": value, "seed": seed} for seed, value in enumerate((97.0, 99.0))]
    rows += [
        row | {"method": "b", "test/acc": 98.5},
        row | {"method": "dense", "sparsity": 0.0, "test/acc": 99.0},
    ]
    told = summary("mlp-mnist", rows)
    assert "dense 99.00" in told and "| a | 98.00 ± 1.41 |" in told
    assert told.index("| b |") < told.index("| a |")


def test_each_order_says_by_how_much_and_whether_it_is_noise() -> None:
    def rows(**methods: list[float]) -> list[dict[str, object]]:
        return [
            {"method": m, "sparsity": 0.9, "test/acc": v} for m, values in methods.items() for v in values
        ]

    def told(**methods: list[float]) -> str:
        return orders(rows(**methods), "test/acc").rpartition("90% ")[2]

    assert told(rigl=[98.0, 98.2], set=[98.0, 98.1]) == "+0.05 ± 0.11 level"
    assert told(rigl=[97.0, 97.1], set=[98.0, 98.1]) == "-1.00 ± 0.07 **does not hold**"
    assert told(rigl=[98.2, 98.1], set=[98.0]) == "+0.15 (one seed)"
    assert told(rigl=[98.2]) == ""
    perplexities = [
        {"method": m, "sparsity": 0.9, "ppl": v} for m, v in (("one_shot", 6.0), (AT_RANDOM, 9.0))
    ]
    assert orders(perplexities, "ppl").endswith("90% +3.00 (one seed)")


def test_tables_go_between_the_markers_and_leave_the_rest() -> None:
    page = f"before\n{BEGIN}\n\nold\n\n{END}\nafter\n"
    new = placed(page, ["a, test/acc", "b"])
    assert new == f"before\n{BEGIN}\n\n#### a, test/acc\n\n#### b\n\n{END}\nafter\n"
    assert placed(new, ["a, test/acc", "b"]) == new


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    told = README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    settings = [line.split()[1].rstrip(",") for line in told.splitlines() if line.startswith("#### ")]
    for setting in settings:
        rows = json.loads((RESULTS / "accuracy" / f"{setting}.json").read_text())["rows"]
        assert summary(setting, rows, SETTINGS[setting].metric) in told, (
            "python -m benchmarks.accuracy --readme"
        )


def test_a_run_that_fails_loses_only_itself_and_is_done_next_time(tmp_path, capsys, monkeypatch) -> None:
    """Trainings in processes of their own, on a folder without data and then on one with a few images."""
    rng = np.random.default_rng(0)
    arrays = {
        f"x_{part}": rng.integers(0, 256, (n, 28, 28), np.uint8) for part, n in (("train", 60), ("test", 20))
    }
    arrays |= {f"y_{part}": rng.integers(0, 10, n) for part, n in (("train", 60), ("test", 20))}
    words = ["--settings", "mlp-mnist", "--methods", "one_shot", "--sparsities", "0.5", "--seeds", "0"]
    for filled in (False, True):
        if filled:
            np.savez(tmp_path / "mnist.npz", **arrays)
        monkeypatch.setattr(
            sys, "argv", ["accuracy", *words, "--root", str(tmp_path), "--out", str(tmp_path)]
        )
        main()
        assert ("failed" in capsys.readouterr().out) is not filled
    rows = json.loads((tmp_path / "mlp-mnist.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"dense", "one_shot"}
