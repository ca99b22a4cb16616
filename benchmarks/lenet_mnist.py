"""LeNet-300-100 on MNIST: accuracy against sparsity, with the training budget of the dense model.

    python -m benchmarks.lenet_mnist --root ../shared/data

Every run has the same epochs, batches, optimizer and learning rates; the rows differ in one callback only. `default` is
`TrainTimePruning(sparsity)` as it stands, `one-shot` the same masks at the end of a dense run without fine-tuning.
Runs that are in the results file are not repeated, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch

from benchmarks.record import RESULTS, facts, table
from lightning_prune import ERK, LAMP, Local, PostTrainingPruning, Random, TrainTimePruning, Wanda
from lightning_prune.examples.data import MNIST
from lightning_prune.examples.tasks import Classifier

GOALS = {0.9: 98.45, 0.95: 98.45, 0.98: 98.3, 0.99: 97.8}
METHODS: dict[str, Any] = {
    "default": lambda sparsity: TrainTimePruning(sparsity, report=False),
    "wanda": lambda sparsity: TrainTimePruning(sparsity, criterion=Wanda(), report=False),
    "local": lambda sparsity: TrainTimePruning(sparsity, scope=Local(), report=False),
    "erk": lambda sparsity: TrainTimePruning(sparsity, scope=ERK(), report=False),
    "lamp": lambda sparsity: TrainTimePruning(sparsity, scope=LAMP(), report=False),
    "random": lambda sparsity: TrainTimePruning(sparsity, criterion=Random(), report=False),
    "one-shot": lambda sparsity: PostTrainingPruning(sparsity, report=False),
}


def run(method: str, sparsity: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the test accuracy in percent."""
    L.seed_everything(seed, verbose=False)
    model = Classifier(
        "MLP",
        sizes=[784, 300, 100, 10],
        optimizer=options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[METHODS[method](sparsity)] if sparsity else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = MNIST(options.root, batch_size=options.batch_size, num_val=0, seed=seed)
    start = time.process_time()
    trainer.fit(model, data)
    seconds = time.process_time() - start
    (metrics,) = trainer.test(model, data, verbose=False)
    weights = [p for p in model.parameters() if p.dim() > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return {
        "method": method if sparsity else "dense",
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": 100 * metrics["test/acc"],
        "zeros": zeros,
        "cpu_seconds": round(seconds, 1),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Return mean and standard deviation over the seeds, a row for each method."""
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"]})
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {"method": method}
        for sparsity in [0.0, *sparsities]:
            found = [
                row["accuracy"] for row in rows if row["method"] == method and row["sparsity"] == sparsity
            ]
            spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
            cells[f"{sparsity:.0%}" if sparsity else "dense"] = f"{mean(found):.2f}{spread}" if found else "–"
        lines.append(cells)
    goal = {"method": "goal", "dense": ""} | {f"{s:.0%}": f"{GOALS[s]:.2f}" for s in sparsities if s in GOALS}
    return table([*lines, {key: goal.get(key, "") for key in lines[0]}])


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="folder with mnist.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(GOALS))
    parser.add_argument("--methods", nargs="+", default=["default"], choices=list(METHODS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=RESULTS / "lenet_mnist.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    settings = {
        k: v
        for k, v in vars(options).items()
        if k in ("epochs", "batch_size", "optimizer", "lr", "weight_decay")
    }
    done: dict[str, Any] = {"rows": []}
    if options.out.is_file():
        done = json.loads(options.out.read_text())
        if done["settings"] != settings:
            raise SystemExit(f"{options.out} holds runs with {done['settings']}: give another --out.")
    done = {**facts(options.seeds[0]), "settings": settings, "rows": done["rows"]}
    wanted = [("default", 0.0), *((m, s) for m in options.methods for s in options.sparsities)]
    for seed in options.seeds:
        for method, sparsity in wanted:
            name = method if sparsity else "dense"
            if any((r["method"], r["sparsity"], r["seed"]) == (name, sparsity, seed) for r in done["rows"]):
                continue
            done["rows"].append(row := run(method, sparsity, seed, options))
            print(row, flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(done, indent=1))
    print(summary(done["rows"]))


if __name__ == "__main__":
    main()
