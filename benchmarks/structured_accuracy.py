"""What a smaller network is worth: LeNet-5 and a small ResNet on Fashion-MNIST at 50 and 25 % of the work.

    python -m benchmarks.structured_accuracy --root ../shared/data

A dense network is trained, made smaller in one shot and fine-tuned; the ways differ in what they take out only.
`scratch` is the network that ours leaves, initialised anew and trained for as many epochs as dense training and
fine-tuning take together. Torch-Pruning runs in the environment of the model zoo (benchmarks/README.md). Runs that are
in the results file are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import RESULTS, facts, table
from lightning_prune import Budget, Channel, Local, Saliency, shrink
from lightning_prune.examples.networks import LeNet5

BUDGETS = (0.5, 0.25)
TOLERANCE = 0.01  # of the dense network's work, for all ways alike
BATCH = 128


class ResNet8(nn.Module):
    """Three residual blocks of 16, 32 and 64 channels behind a stem of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
        self.skip = nn.Identity() if i == o else nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.skip(x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "LeNet-5": (LeNet5, 30_000, 4, 4),
    "ResNet-8": (ResNet8, 30_000, 4, 4),
}
"""Name -> network, training images, epochs of dense training and of fine-tuning."""


def train_(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, seed: int) -> None:
    """Train with Adam, the learning rate falling along a cosine."""
    x, y = data
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    draw, steps = torch.Generator().manual_seed(seed), epochs * (len(x) // BATCH)
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            order = torch.randperm(len(x), generator=draw)
        at = order[step % (len(x) // BATCH) * BATCH :][:BATCH]
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        F.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the test accuracy in percent."""
    model.eval()
    hits = [(model(x).argmax(1) == y).float() for x, y in zip(*(t.split(500) for t in data), strict=True)]
    return 100 * float(torch.cat(hits).mean())


def macs(model: nn.Module, x: Tensor) -> int:
    """Return the multiply-accumulates of a call, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2


def ours(model: nn.Module, data: tuple[Tensor, Tensor], budget: float, **settings: Any) -> None:
    """Prune channels until the work fits, on eight batches for criteria by gradients."""
    batches = [(data[0][i : i + BATCH], data[1][i : i + BATCH]) for i in range(0, 8 * BATCH, BATCH)]

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    limit = Budget(macs=budget, tolerance=TOLERANCE)
    granularity = Channel(multiple_of=1)
    shrink(
        model.eval(),
        data[0][:2],
        budget=limit,
        granularity=granularity,
        batches=batches,
        loss=loss,
        **settings,
    )


def torch_pruning(model: nn.Module, data: tuple[Tensor, Tensor], budget: float) -> nn.Module:
    """Prune with Torch-Pruning's magnitude pruner, its one setting bisected until the work fits."""
    import torch_pruning as tp

    x, goal = data[0][:2], (budget + TOLERANCE) * macs(model, data[0][:2])
    low, high, best = 0.0, 0.95, model
    for _ in range(9):
        found = copy.deepcopy(model)
        pruner = tp.pruner.MagnitudePruner(
            found,
            x,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=(low + high) / 2,
            ignored_layers=[found.head],
        )
        pruner.step()
        if macs(found, x) > goal:
            low = (low + high) / 2
        else:
            high, best = (low + high) / 2, found
    return best


WAYS: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor], float], nn.Module | None]] = {
    "ours, default": lambda m, d, b: ours(m, d, b),
    "ours, saliency": lambda m, d, b: ours(m, d, b, criterion=Saliency()),
    "ours, saliency, local": lambda m, d, b: ours(m, d, b, criterion=Saliency(), scope=Local()),
    "Torch-Pruning": torch_pruning,
}


def runs(name: str, seed: int, root: Path, ways: list[str], done: set[tuple[Any, ...]]) -> Any:
    """Yield a row for each way and budget that is not done yet."""
    make, num, dense_epochs, more_epochs = NETWORKS[name]
    file = np.load(root / "fashion_mnist.npz")
    train, test = (
        (
            (torch.from_numpy(file[f"x_{p}"]).float().unsqueeze(1) / 255 - 0.286) / 0.353,
            torch.from_numpy(file[f"y_{p}"]).long(),
        )
        for p in ("train", "test")
    )
    part = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:num]
    data = (train[0][part], train[1][part])
    wanted = [(way, budget) for budget in BUDGETS for way in [*ways, "scratch"]]
    if all((name, way, budget, seed) in done for way, budget in wanted):
        return
    torch.manual_seed(seed)
    dense = make()
    train_(dense, data, dense_epochs, 2e-3, seed)
    full = macs(dense, data[0][:2])
    yield {
        "network": name,
        "way": "dense",
        "budget": 1.0,
        "seed": seed,
        "accuracy": accuracy(dense, test),
        "macs": 1.0,
    }
    for way, budget in wanted:
        if (name, way, budget, seed) in done:
            continue
        start = time.process_time()
        small = copy.deepcopy(dense)
        if way == "scratch":
            ours(small, data, budget)
            torch.manual_seed(seed + 100)
            for module in small.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            train_(small, data, dense_epochs + more_epochs, 2e-3, seed + 1)
        else:
            small = WAYS[way](small, data, budget) or small
            train_(small, data, more_epochs, 2e-3, seed + 1)
        yield {
            "network": name,
            "way": way,
            "budget": budget,
            "seed": seed,
            "accuracy": accuracy(small, test),
            "macs": macs(small, data[0][:2]) / full,
            "params": sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters()),
            "cpu_seconds": round(time.process_time() - start, 1),
        }


def summary(rows: list[dict[str, Any]]) -> str:
    """Return means and standard deviations over the seeds."""
    lines = []
    for name in NETWORKS:
        for way in ["dense", *WAYS, "scratch"]:
            line = {"network": name, "way": way}
            for budget in (1.0, *BUDGETS):
                found = [r for r in rows if (r["network"], r["way"], r["budget"]) == (name, way, budget)]
                values = [r["accuracy"] for r in found]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                share = statistics.mean(r["macs"] for r in found) if found else 0.0
                text = f"{statistics.mean(values):.2f} ± {spread:.2f} ({share:.0%})" if values else ""
                line[f"{budget:.0%} of the MACs"] = text
            lines.append(line)
    return table(lines)


def main() -> None:
    """Run what is not in the results file yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder with fashion_mnist.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=RESULTS / "structured_accuracy.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in options.seeds:
        for name in options.networks:
            done = {(r["network"], r["way"], r["budget"], r["seed"]) for r in rows}
            for row in runs(name, seed, options.root, options.ways, done):
                if (row["network"], row["way"], row["budget"], row["seed"]) not in done:
                    rows.append(row)
                    print(row, flush=True)
                    options.out.write_text(json.dumps({**facts(seed), "rows": rows}, indent=1) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
