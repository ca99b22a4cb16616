"""Accuracy against sparsity for every method: each recipe of `conf/pruning` in the same training budget.

    python -m benchmarks.accuracy --root ../shared/data --settings mlp-mnist --sparsities 0.95 --seeds 0 1 2
    python -m benchmarks.accuracy --root ../shared/data --small
    python -m benchmarks.accuracy --show

A run is what `python train.py pruning=METHOD pruning.sparsity=S` does, with the setting's data, network and epochs;
methods that prune after training start from one dense network for each seed, as with `train=false`. The
baselines: `one_shot` (no training after pruning), the same at random, `random` (along the ramp), and Lightning's own
ModelPruning by global magnitude, given the increments with which its compounding amounts follow the same cubic ramp.
Recipes of 2:4, of channels (to half of the MACs, also by other criteria), heads and blocks are below each table.
Each setting has a results file; runs that are in it are not repeated, so an interrupted benchmark goes on where it
stopped, and methods can be added later.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.accuracy_others import OTHERS, others
from benchmarks.accuracy_runs import (
    ROOT,
    SETTINGS,
    SMALL,
    SPARSITIES,
    TELLING,
    Run,
    methods,
    result,
)
from benchmarks.accuracy_tables import README, placed, summary
from benchmarks.record import RESULTS, facts
from lightning_prune.report.storage import write_text

Found = dict[str, list[dict[str, Any]]]
"""Results by setting."""


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=str(ROOT / "data"), help="folder with the data files")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="by default all")
    parser.add_argument("--methods", nargs="+", help="recipes; by default all")
    parser.add_argument("--sparsities", type=float, nargs="+", help="in the order in which they are run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--small", action="store_true", help="by default fewer settings, methods, sparsities")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy", help="folder of the results files")
    parser.add_argument(
        "--trained", type=Path, default=ROOT / "outputs" / "accuracy", help="folder of the dense networks"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--show", action="store_true", help="only print what the results files hold")
    parser.add_argument("--readme", action="store_true", help="only put that into benchmarks/README.md")
    options = parser.parse_args()
    options.settings = options.settings or list(SMALL if options.small else SETTINGS)
    options.sparsities = options.sparsities or list(SPARSITIES[: 3 if options.small else None])
    options.methods = options.methods or (list(TELLING) if options.small else None)
    return options


def wanted(options: argparse.Namespace) -> list[Run]:
    """Return all runs that the options ask for, what tells most first."""
    methods_asked = options.methods or methods()
    grid = [("dense", 0.0), *((m, s) for s in options.sparsities for m in methods_asked if m not in OTHERS)]
    return [
        Run(at, method, sparsity, seed)
        for seed in options.seeds
        for at in options.settings
        for method, sparsity in [
            *grid,
            *((m, 0.5) for m in others(at) if not options.methods or m in options.methods),
        ]
    ]


def carry_out(missing: Sequence[Run], options: argparse.Namespace, rows: Found) -> None:
    """Run what is missing, each result written down as it comes."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        ProcessPoolExecutor(options.workers, get_context("spawn")) as pool,
        Progress(*columns) as progress,
    ):
        task = progress.add_task("", total=len(missing))
        todo = {
            pool.submit(result, run, options.root, options.accelerator, options.trained): run
            for run in missing
        }
        for future in as_completed(todo):
            run = todo[future]
            progress.advance(task)
            if error := future.exception():
                progress.console.print(f"{run} failed: {error!r}")
                continue
            rows[run.setting].append(future.result())
            progress.console.print(future.result())
            record = {**facts(options.seeds), "rows": rows[run.setting]}
            write_text(options.out / f"{run.setting}.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Run what is missing, and print the tables."""
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {setting: options.out / f"{setting}.json" for setting in options.settings}
    rows: Found = {s: json.loads(f.read_text())["rows"] if f.is_file() else [] for s, f in files.items()}
    if not (options.show or options.readme):
        done = {Run(*(r[key] for key in Run._fields)) for found in rows.values() for r in found}
        carry_out([run for run in wanted(options) if run not in done], options, rows)
    told = [summary(setting, found, SETTINGS[setting].metric) for setting, found in rows.items() if found]
    if options.readme:
        README.write_text(placed(README.read_text(encoding="utf-8"), told), encoding="utf-8")
    print("\n\n".join(told))


if __name__ == "__main__":
    main()
