"""Accuracy against sparsity for every method: each recipe of `conf/pruning` in the same training budget.

    python -m benchmarks.accuracy --root ../shared/data --settings mlp-mnist --sparsities 0.95 --seeds 0 1 2

A run is what `python train.py pruning=METHOD pruning.sparsity=S` does, with the setting's data, network and epochs. The
baselines: `one_shot` (no training after pruning), `random`, and Lightning's own ModelPruning by global magnitude, given
the increments with which its compounding amounts follow the same cubic ramp. Each setting has a results file; runs that
are in it are not repeated, so an interrupted benchmark goes on where it stopped, and methods can be added later.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelPruning
from omegaconf import open_dict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.record import RESULTS, facts, table
from lightning_prune import cli

ROOT = Path(__file__).resolve().parents[1]
ON_ALL = ["data.num_val=0", "+trainer.limit_val_batches=0"]
FASHION_RESNET = ["model=resnet20", "model.num_blocks=1", "data=fashion_mnist", ON_ALL[1]]


@dataclass(frozen=True)
class Setting:
    """Data, network and epochs, as the command line would say them, and the metric by which methods are compared."""

    epochs: int
    words: Sequence[str]
    metric: str = "test/acc"
    exclude: Sequence[str] = ()

    @property
    def is_percentage(self) -> bool:
        return self.metric == "test/acc"


SETTINGS = {
    "mlp-mnist": Setting(10, ["model=lenet_300_100", "data=mnist", *ON_ALL]),
    "lenet5-mnist": Setting(4, ["model=lenet5", "data=mnist", *ON_ALL]),
    "mlp-fashion": Setting(10, ["model=lenet_300_100", "data=fashion_mnist", *ON_ALL]),
    "resnet8-fashion-subset": Setting(6, [*FASHION_RESNET, "data.num_val=48000"]),
    "resnet8-fashion": Setting(6, [*FASHION_RESNET, "data.num_val=0"]),
    "gpt-shakespeare": Setting(
        10,
        ["model=gpt", "data=tinyshakespeare", ON_ALL[1]],
        "test/perplexity",
        ("network.embedding", "network.positions", "network.head"),
    ),
}
"""The subset is the first 12,000 images, for a CPU."""


class Run(NamedTuple):
    """One training."""

    setting: str
    method: str
    sparsity: float
    seed: int


SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
PUBLISHED = {
    ("mlp-mnist", 0.95): "98.47 sparse momentum, 98.4 SNIP",
    ("mlp-mnist", 0.98): "98.01 sparse momentum, 97.6 SNIP, 98.0 DNS (98.2 %)",
    ("mlp-mnist", 0.99): "97.64 sparse momentum",
    ("lenet5-mnist", 0.95): "99.31 sparse momentum",
    ("lenet5-mnist", 0.98): "99.24 sparse momentum",
    ("lenet5-mnist", 0.99): "99.17 sparse momentum, 99.1 DNS (99.1 %)",
}
"""Figures of other authors for the same network and data, their training budgets being their own."""
LEFT_OUT = {
    "none",
    "gradual",
    "rows",
    "global_structured",
    "local_structured",
    "network_slimming",
    "sparse_learning",
    "heads",
    "depth",
}
LEFT_OUT |= {"latency_budget"}
"""Recipes that remove more than single weights; `gradual` is what global_unstructured is."""
IN_TRAININGS = {
    "lottery_ticket": ["trainer.max_epochs={one}", "pruning.num_levels={levels}"],
    "rewinding": ["trainer.max_epochs={one}", "pruning.num_levels={short}"],
    "lr_rewinding": ["trainer.max_epochs={one}", "pruning.num_levels={levels}"],
}
"""What makes several trainings together as long as one of the others; those of `rewinding` are an epoch shorter."""
MODEL_PRUNING = "Lightning's ModelPruning"


def methods() -> list[str]:
    """Return the recipes that take a sparsity and remove single weights, and the baseline from Lightning."""
    found = []
    for path in sorted((ROOT / "conf" / "pruning").glob("*.yaml")):
        if path.stem not in LEFT_OUT:
            pruning = composed(Run("mlp-mnist", path.stem, 0.5, 0)).get("pruning")
            if pruning and pruning.get("sparsity") is not None:
                found.append(path.stem)
    return [*found, MODEL_PRUNING]


def composed(run: Run, root: str = "", folder: str = ".", accelerator: str = "cpu") -> Any:
    """Compose the configuration of a run; recipes that set their own sparsity leave it as it is."""
    setting, method, sparsity, seed = run
    epochs, overrides = SETTINGS[setting].epochs, SETTINGS[setting].words
    recipe = "none" if method in ("dense", MODEL_PRUNING) else method
    words = [*overrides, f"pruning={recipe}", f"trainer.max_epochs={epochs}", f"seed={seed}"]
    one = max(2, epochs // 5)
    levels, short = (epochs - one) // one, (epochs - one) // (one - 1)
    words += [word.format(one=one, levels=levels, short=short) for word in IN_TRAININGS.get(method, ())]
    words += ["callbacks=none", "logger=none", "trainer.enable_progress_bar=false"]
    words += [f"trainer.accelerator={accelerator}", f"hydra.runtime.output_dir={folder}"]
    words += [f"data.root={root}"] if root else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", words, return_hydra_config=True)
    pruning = cfg.get("pruning") or {}
    with open_dict(cfg):
        if pruning.get("sparsity") is not None:
            pruning.sparsity = sparsity
        if SETTINGS[setting].exclude and "exclude" in pruning:
            pruning.exclude = list(SETTINGS[setting].exclude)
        if "report" in pruning:
            pruning.report = False
        if method == MODEL_PRUNING:
            target = {"_target_": "benchmarks.accuracy.model_pruning", "sparsity": sparsity, "epochs": epochs}
            cfg.callbacks = {"pruning": target}
    return cfg


def model_pruning(sparsity: float, epochs: int) -> ModelPruning:
    """Return Lightning's callback with amounts that, compounded, follow a cubic ramp over 70 % of the epochs."""

    def reached(epoch: int) -> float:
        progress = min(1.0, (epoch + 1) / (0.7 * epochs))
        return sparsity * (1 - (1 - progress) ** 3)

    def amount(epoch: int) -> float:
        before = reached(epoch - 1) if epoch else 0.0
        return (reached(epoch) - before) / (1 - before)

    return ModelPruning(
        "l1_unstructured",
        parameter_names=["weight"],  # by default it prunes biases as well
        amount=amount,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
    )


def result(run: Run, root: str, accelerator: str = "cpu") -> dict[str, Any]:
    """Train once and return the metric of the test, an accuracy in percent."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    metric = SETTINGS[run.setting].metric
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cfg = composed(run, root, folder, accelerator)
        HydraConfig.instance().set_config(cfg)
        metrics = cli.train(cfg)
    assert isinstance(metrics, dict)
    value = metrics[metric] * (100 if SETTINGS[run.setting].is_percentage else 1)
    return run._asdict() | {metric: value, "cpu_seconds": round(time.process_time() - start, 1)}


def summary(setting: str, rows: list[dict[str, Any]]) -> str:
    """Return a setting's table: mean and standard deviation over the seeds, the best at high sparsity first."""
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"]})
    metric = SETTINGS[setting].metric

    def values(method: str, sparsity: float) -> list[float]:
        return [row[metric] for row in rows if (row["method"], row["sparsity"]) == (method, sparsity)]

    lines, ranks = [], {}
    for method in dict.fromkeys(row["method"] for row in rows if row["sparsity"]):
        found = {f"{s:.0%}": values(method, s) for s in sparsities}
        lines.append({"method": method} | {name: _cell(at) for name, at in found.items()})
        means = [mean(at) for at in found.values() if at]
        ranks[method] = mean(means) * (-1 if SETTINGS[setting].is_percentage else 1)
    lines.sort(key=lambda line: ranks[line["method"]])
    told = {f"{s:.0%}": PUBLISHED.get((setting, s), "–") for s in sparsities}
    lines += [{"method": "published"} | told] if set(told.values()) != {"–"} else []
    return f"{setting}, {metric}, dense {_cell(values('dense', 0.0))}\n\n{table(lines) if lines else ''}"


def _cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" if values else "–"


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=str(ROOT / "data"), help="folder with the data files")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", help="recipes; by default all that remove single weights")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy", help="folder of the results files")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--show", action="store_true", help="only print what the results files hold")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {setting: options.out / f"{setting}.json" for setting in options.settings}
    rows = {s: json.loads(f.read_text())["rows"] if f.is_file() else [] for s, f in files.items()}
    done = {
        Run(r["setting"], r["method"], r["sparsity"], r["seed"]) for found in rows.values() for r in found
    }
    chosen = [("dense", 0.0), *((m, s) for s in options.sparsities for m in options.methods or methods())]
    wanted = [Run(at, m, s, seed) for at in options.settings for seed in options.seeds for m, s in chosen]
    missing = [] if options.show else [run for run in wanted if run not in done]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        ProcessPoolExecutor(options.workers, get_context("spawn")) as pool,
        Progress(*columns) as progress,
    ):
        task = progress.add_task("", total=len(missing))
        todo = {pool.submit(result, run, options.root, options.accelerator): run for run in missing}
        for future in as_completed(todo):
            run = todo[future]
            progress.advance(task)
            if error := future.exception():
                progress.console.print(f"{run} failed: {error!r}")
                continue
            rows[run.setting].append(future.result())
            progress.console.print(future.result())
            record = {**facts(options.seeds), "rows": rows[run.setting]}
            files[run.setting].write_text(json.dumps(record, indent=1) + "\n")
    for setting, found in rows.items():
        print(summary(setting, found) + "\n")


if __name__ == "__main__":
    main()
