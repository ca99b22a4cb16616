"""Training that gets faster as the model gets smaller: `python -m benchmarks.structured_fit`.

Each way fits the same network on the same batch: plainly, with channels masked along a ramp and taken out at the end,
or taken out at every update, until half of the multiply-accumulates are left. Steps are timed from batch to batch, on
one thread in CPU time; the ways take turns. What an update itself costs (plan, proof, surgery) is told apart.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.record import facts, quartiles, table, write
from benchmarks.structured_speed import NETWORKS
from lightning_prune import Budget, Channel, TrainTimePruning, Window

STEPS = 80
WINDOW = Window(start=0.125, end=0.625, every=0.125)
PHASES = tuple(range(0, STEPS, STEPS // 8))
"""The steps at which a phase of the run begins; the ramp has updates at those from the second to the sixth."""
WAYS = {"plain": None, "at the end": "end", "at each update": "update"}


class Module(L.LightningModule):
    """A classifier of whatever its last dim scores."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out = self(batch).flatten(0, -2)
        return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.long))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Clock(L.Callback):
    """CPU seconds of each step and of the whole; it comes first of the callbacks, so that updates are not in a step."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.stepped: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.started.append(time.process_time())

    def on_train_batch_end(self, *_: Any) -> None:
        self.stepped.append(time.process_time())

    def step_seconds(self) -> list[float]:
        """Return the median step of each phase."""
        found = [end - start for start, end in zip(self.started, self.stepped, strict=True)]
        return [median(found[start + 1 : start + STEPS // 8]) for start in PHASES]

    def total(self) -> float:
        return self.stepped[-1] - self.started[0]


def fit(name: str, way: str) -> dict[str, Any]:
    """Train one network in one way."""
    make, batch, example = NETWORKS[name]
    torch.manual_seed(0)
    module, clock, shrink = Module(make()), Clock(), WAYS[way]
    pruning = TrainTimePruning(
        budget=Budget(macs=0.5), granularity=Channel(), window=WINDOW, report=False, shrink=shrink or "never"
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[clock] if shrink is None else [clock, pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = sum(p.numel() for p in module.parameters())
    trainer.fit(module, DataLoader([example(batch)] * STEPS, batch_size=None))
    after = sum(p.numel() for p in module.parameters())
    assert (shrink is None) == (before == after), (name, way)
    return {"steps": clock.step_seconds(), "total": clock.total(), "params": after / before}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Let the ways take turns on one network."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in list(WAYS) if number % 2 else list(reversed(WAYS)):
            found[way].append(fit(name, way))
    rows = {}
    for way, fits in found.items():
        pairs = list(zip(fits, found["plain"], strict=True))
        rows[way] = {
            "params": fits[0]["params"],
            "total": quartiles([one["total"] / plain["total"] for one, plain in pairs]),
            "faster": [
                quartiles([plain["steps"][phase] / one["steps"][phase] for one, plain in pairs])
                for phase in range(len(PHASES))
            ],
            "steps_per_second": [
                1 / median(one["steps"][phase] for one in fits) for phase in range(len(PHASES))
            ],
        }
    return rows


def shown(networks: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, rows in networks.items():
        for way, row in rows.items():
            line = {"network": name, "way": way}
            for step, speed, faster in zip(PHASES, row["steps_per_second"], row["faster"], strict=True):
                line[f"from step {step}"] = f"{speed:.1f} ({faster[1]:.2f})"
            lines.append(line | {"whole run, of plain": f"{row['total'][1]:.2f}"})
    return table(lines)


def main() -> None:
    """Measure all networks and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    networks = {name: measure(name, options.rounds) for name in options.networks}
    print(shown(networks))
    print(write("structured_fit", {**facts(0), "rounds": options.rounds, "networks": networks}))


if __name__ == "__main__":
    main()
