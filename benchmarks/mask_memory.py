"""How many bytes keeping a network 90 % sparse takes, live and in a checkpoint: `python -m benchmarks.mask_memory`.

Each way fits the same network within `Trainer.fit`. After the last step but one, when gradients and the optimizer's
state are there, the bytes of all tensors of the process are summed up, each storage once, and a checkpoint is written;
what is more than with plain training is divided by the weights that are pruned. Nothing is timed: counts need no
rounds.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.overhead import NETWORKS, OPTIMIZERS, SPARSITY, live_bytes
from benchmarks.overhead_in_fit import NUM_BATCHES, WAYS, trained
from benchmarks.record import facts, table, write
from lightning_prune import SparseTraining

ALL = WAYS | {"SparseTraining": lambda module: [SparseTraining(SPARSITY, report=False)]}


class Scale(L.Callback):
    """Weighs what is live, and what a checkpoint holds, before the last batch."""

    def __init__(self, before: int, last_step: int) -> None:
        self.before, self.last_step, self.live, self.checkpoint = before, last_step, 0, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step != self.last_step:
            return
        gc.collect()
        self.live = live_bytes() - self.before
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_checkpoint(Path(folder) / "sparse.ckpt")
            self.checkpoint = (Path(folder) / "sparse.ckpt").stat().st_size


def weigh(network: str, way: str, optimizer: str, seed: int) -> tuple[int, int, int]:
    """Return the bytes live and in a checkpoint, and the number of weights that can be pruned."""
    gc.collect()
    scale = Scale(live_bytes(), last_step=2 * NUM_BATCHES[network] - 1)
    module = trained(network, ALL[way], optimizer, seed, scale)
    layers = [m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return scale.live, scale.checkpoint, sum(w.numel() for w in layers)


def measure(network: str, optimizer: str, seed: int) -> dict[str, Any]:
    """Return the bytes of each way, and how many they are more for each weight than plain training's."""
    rows: dict[str, dict[str, float]] = {}
    for way in ALL:
        live, checkpoint, num_weights = weigh(network, way, optimizer, seed)
        plain = rows.get("plain", {"live_bytes": live, "checkpoint_bytes": checkpoint})
        rows[way] = {
            "live_bytes": live,
            "checkpoint_bytes": checkpoint,
            "live_a_weight": (live - plain["live_bytes"]) / num_weights,
            "checkpoint_a_weight": (checkpoint - plain["checkpoint_bytes"]) / num_weights,
        }
    return {"network": network, "optimizer": optimizer, "weights": num_weights, "ways": rows}


def main() -> None:
    """Weigh each way with each network and optimizer, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["lenet", "mlp", "resnet"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["sgd", "adamw"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = facts(args.seed) | {"sparsity": SPARSITY, "runs": []}
    for network in args.networks:
        for optimizer in args.optimizers:
            run = measure(network, optimizer, args.seed)
            record["runs"].append(run)
            print(f"\n{network}, {optimizer}, {run['weights']:,} weights")
            print(table([{"way": way, **shown(row)} for way, row in run["ways"].items()]), flush=True)
    print(f"\n{write('mask_memory', record).name}")


def shown(row: dict[str, float]) -> dict[str, str]:
    """Return a row's cells."""
    return {
        "live MB": f"{row['live_bytes'] / 1e6:.2f}",
        "more bytes a weight": f"{row['live_a_weight']:+.3f}",
        "checkpoint MB": f"{row['checkpoint_bytes'] / 1e6:.2f}",
        "more bytes a weight in it": f"{row['checkpoint_a_weight']:+.3f}",
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    main()
