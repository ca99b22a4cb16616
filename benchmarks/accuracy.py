"""Accuracy against sparsity for every method: each recipe of `conf/pruning` in the same training budget.

    python -m benchmarks.accuracy --root ../shared/data --settings mlp-mnist --sparsities 0.95 --seeds 0 1 2

A run is what `python train.py pruning=METHOD pruning.sparsity=S` does, with the setting's data, network and epochs. The
baselines: `one_shot` (no training after pruning), `random`, and Lightning's own ModelPruning by global magnitude, given
the increments with which its compounding amounts follow the same cubic ramp. Runs that are in the results file are not
repeated, so an interrupted benchmark goes on where it stopped, and methods can be added later.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

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
SETTINGS: dict[str, tuple[int, list[str]]] = {
    "mlp-mnist": (10, ["model=lenet_300_100", "data=mnist", *ON_ALL]),
    "lenet5-mnist": (4, ["model=lenet5", "data=mnist", *ON_ALL]),
    "mlp-fashion": (10, ["model=lenet_300_100", "data=fashion_mnist", *ON_ALL]),
    "resnet8-fashion": (
        6,
        ["model=resnet20", "model.num_blocks=1", "data=fashion_mnist", "data.num_val=48000", ON_ALL[1]],
    ),
}
"""Setting -> epochs, and what the command line would say. The last one trains on the first 12,000 images."""
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
            pruning = composed(path.stem, 0.5, "mlp-mnist", "", None).get("pruning")
            if pruning and pruning.get("sparsity") is not None:
                found.append(path.stem)
    return [*found, MODEL_PRUNING]


def composed(method: str, sparsity: float, setting: str, root: str, folder: str | None, seed: int = 0) -> Any:
    """Compose the configuration of a run; recipes that set their own sparsity leave it as it is."""
    epochs, overrides = SETTINGS[setting]
    recipe = "none" if method in ("dense", MODEL_PRUNING) else method
    words = [*overrides, f"pruning={recipe}", f"trainer.max_epochs={epochs}", f"seed={seed}"]
    one = max(2, epochs // 5)
    levels, short = (epochs - one) // one, (epochs - one) // (one - 1)
    words += [word.format(one=one, levels=levels, short=short) for word in IN_TRAININGS.get(method, ())]
    words += ["callbacks=none", "logger=none", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    words += [f"hydra.runtime.output_dir={folder or '.'}", *([f"data.root={root}"] if root else [])]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", words, return_hydra_config=True)
    pruning = cfg.get("pruning") or {}
    with open_dict(cfg):
        if pruning.get("sparsity") is not None:
            pruning.sparsity = sparsity
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


def run(method: str, sparsity: float, seed: int, setting: str, root: str) -> dict[str, Any]:
    """Train once and return the test accuracy in percent."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = composed(method, sparsity, setting, root, folder, seed)
        HydraConfig.instance().set_config(cfg)
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = cli.train(cfg)
    assert isinstance(metrics, dict)
    return {
        "setting": setting,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": 100 * metrics["test/acc"],
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a table for each setting: mean and standard deviation over the seeds."""
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        ours = [row for row in rows if row["setting"] == setting]
        sparsities = sorted({row["sparsity"] for row in ours if row["sparsity"]})
        dense = _cell([row["accuracy"] for row in ours if not row["sparsity"]])
        lines = []
        for method in dict.fromkeys(row["method"] for row in ours if row["sparsity"]):
            found = {
                s: [r["accuracy"] for r in ours if (r["method"], r["sparsity"]) == (method, s)]
                for s in sparsities
            }
            lines.append({"method": method} | {f"{s:.0%}": _cell(values) for s, values in found.items()})
        lines.sort(key=lambda line: [line[f"{s:.0%}"] for s in reversed(sparsities)], reverse=True)
        told = {f"{s:.0%}": PUBLISHED.get((setting, s), "–") for s in sparsities}
        parts.append(f"{setting}, dense {dense}\n\n{table([*lines, {'method': 'published'} | told])}")
    return "\n\n".join(parts)


def _cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" if values else "–"


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", default=str(ROOT / "data"), help="folder with mnist.npz and fashion_mnist.npz"
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", help="recipes; by default all that remove single weights")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--show", action="store_true", help="only print what the results file holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    chosen = [("dense", 0.0), *((m, s) for m in options.methods or methods() for s in options.sparsities)]
    wanted = [(m, s, seed, at) for at in options.settings for seed in options.seeds for m, s in chosen]
    done = {(row["method"], row["sparsity"], row["seed"], row["setting"]) for row in rows}
    missing = [] if options.show else [key for key in wanted if key not in done]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(missing))
        for method, sparsity, seed, setting in missing:
            progress.update(task, description=f"{setting} {method} {sparsity:.0%} seed {seed}")
            rows.append(row := run(method, sparsity, seed, setting, options.root))
            progress.console.print(row)
            options.out.write_text(json.dumps({**facts(seed), "rows": rows}, indent=1) + "\n")
            progress.advance(task)
    print(summary(rows))


if __name__ == "__main__":
    main()
