"""What a smaller network is worth: LeNet-5 and a small ResNet on Fashion-MNIST at 50 and 25 % of the work.

    python -m benchmarks.structured_accuracy --root ../shared/data

A dense network is trained, made smaller and fine-tuned, for equally many steps in all ways. Most ways take channels out
in one shot; with "least squares" the layers that lose inputs make up for them, on eight training batches, before the
fine-tuning; those "in training" shrink in four steps of its first half; "distilled" adds the dense teacher.
`scratch` is the network that ours leaves with `Local()`, initialised anew and trained for as many epochs as dense
training and fine-tuning take together; `scratch, as long as fine-tuning` for as many as the other ways are trained for
once the dense network is there. Torch-Pruning runs in the environment of the model zoo (benchmarks/README.md).
Runs that are in the results file are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import RESULTS, facts, table
from lightning_prune import Budget, Channel, LeastSquares, Local, Saliency, shrink
from lightning_prune.examples.networks import LeNet5
from lightning_prune.model.distillation import distillation_loss

Data: TypeAlias = tuple[Tensor, Tensor]
Key: TypeAlias = tuple[str, str, float, int]

BUDGETS = (0.5, 0.25)
TOLERANCE = 0.01  # of the dense network's work, for all ways alike
BATCH, LR = 128, 2e-3


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


NETWORKS: dict[str, Callable[[], nn.Module]] = {"LeNet-5": LeNet5, "ResNet-8": ResNet8}


@dataclass(frozen=True)
class Length:
    """How many training images, epochs of dense training and of fine-tuning, the learning rate of the latter, and
    whether all ways have as much work as Torch-Pruning's steps come to."""

    images: int
    dense: int
    more: int
    lr: float = LR
    is_work_equal: bool = False


def train_(
    model: nn.Module,
    data: Data,
    epochs: int,
    seed: int,
    teacher: nn.Module | None = None,
    shrinks: Mapping[float, Callable[[torch.optim.Optimizer], None]] = MappingProxyType({}),
    lr: float = LR,
) -> None:
    """Train with Adam, the learning rate falling along a cosine; `shrinks` are done at fractions of the run."""
    x, y = data
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    draw, num_batches = torch.Generator().manual_seed(seed), len(x) // BATCH
    steps = epochs * num_batches
    due = {round(fraction * steps): shrink for fraction, shrink in shrinks.items()}
    for step in range(steps):
        if step in due:
            due[step](optimizer)
            model.train()
        if step % num_batches == 0:
            order = torch.randperm(len(x), generator=draw).to(x.device)
        at = order[step % num_batches * BATCH :][:BATCH]
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        out = model(x[at])
        loss = F.cross_entropy(out, y[at])
        if teacher is not None:
            with torch.no_grad():
                told = teacher(x[at])
            loss = 0.5 * loss + 0.5 * distillation_loss(out, told, 4.0)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the test accuracy in percent."""
    model.eval()
    hits = [(model(x).argmax(1) == y).float() for x, y in zip(*(t.split(500) for t in data), strict=True)]
    return 100 * float(torch.cat(hits).mean())


def macs(model: nn.Module, x: Tensor) -> int:
    """Return the multiply-accumulates of a call, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2


def ours(
    model: nn.Module,
    data: Data,
    budget: float,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    tolerance: float = TOLERANCE,
    **settings: Any,
) -> None:
    """Prune channels until the work fits, with eight batches for what asks for data."""
    batches = [(data[0][i : i + BATCH], data[1][i : i + BATCH]) for i in range(0, 8 * BATCH, BATCH)]

    def loss(net: nn.Module, batch: Data) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    shrink(
        model.eval(),
        data[0][:2],
        budget=Budget(macs=budget, tolerance=tolerance),
        granularity=Channel(multiple_of=1),
        batches=batches,
        loss=loss,
        optimizers=optimizers,
        **settings,
    )


def torch_pruning(model: nn.Module, data: Data, budget: float) -> nn.Module:
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


@dataclass(frozen=True)
class Way:
    """How a network becomes smaller: in one shot, by `prune`, or step by step in the first half of the fine-tuning."""

    prune: Callable[[nn.Module, Data, float], nn.Module | None] | None = None
    in_training: Mapping[str, Any] | None = None
    distilled: bool = False

    def __call__(self, dense: nn.Module, data: Data, budget: float, length: Length, seed: int) -> nn.Module:
        """Return the fine-tuned small network."""
        small = copy.deepcopy(dense)
        shrinks = {}
        if self.in_training is None:
            assert self.prune is not None
            small = self.prune(small, data, budget) or small
        else:
            full = macs(dense, data[0][:2])

            def step(share: float, optimizer: torch.optim.Optimizer) -> None:
                now = macs(small, data[0][:2]) / full
                tolerance = (TOLERANCE if share == budget else 0.05) / now
                if share < now:
                    ours(small, data, share / now, [optimizer], tolerance, **(self.in_training or {}))

            shares = {i / 6: budget + (1 - budget) * (1 - (i + 1) / 4) ** 2 for i in range(4)}
            shrinks = {at: partial(step, share) for at, share in shares.items()}
        teacher = dense.eval() if self.distilled else None
        train_(small, data, length.more, seed + 1, teacher, shrinks, length.lr)
        return small


SALIENCY = {"criterion": Saliency()}
SOLVED = {"solver": LeastSquares(), "reestimate_batch_norm": True}
WAYS = {
    "ours, least squares": Way(partial(ours, **SOLVED)),
    "ours, saliency, least squares": Way(partial(ours, **SALIENCY, **SOLVED)),
    "ours, default": Way(ours),
    "ours, distilled": Way(ours, distilled=True),
    "ours, saliency": Way(partial(ours, **SALIENCY)),
    "ours, saliency, local": Way(partial(ours, scope=Local(), **SALIENCY)),
    "ours, saliency, local, least squares": Way(partial(ours, scope=Local(), **SALIENCY, **SOLVED)),
    "ours, in training": Way(in_training={}),
    "ours, in training, saliency": Way(in_training=SALIENCY),
    "ours, in training, distilled": Way(in_training={}, distilled=True),
    "ours, in training, saliency, distilled": Way(in_training=SALIENCY, distilled=True),
    "Torch-Pruning": Way(torch_pruning),
    "Torch-Pruning, distilled": Way(torch_pruning, distilled=True),
}
SCRATCH: dict[str, Callable[[Length], int]] = {  # how many epochs
    "scratch": lambda length: length.dense + length.more,
    "scratch, as long as fine-tuning": lambda length: length.more,
}


def load(root: Path, num: int, seed: int, device: str) -> tuple[Data, Data]:
    """Return `num` training images, which the seed chooses, and the test images."""
    file = np.load(root / "fashion_mnist.npz")
    train, test = (
        (
            (torch.from_numpy(file[f"x_{p}"]).float().unsqueeze(1) / 255 - 0.286) / 0.353,
            torch.from_numpy(file[f"y_{p}"]).long(),
        )
        for p in ("train", "test")
    )
    part = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:num]
    data = (train[0][part].to(device), train[1][part].to(device))
    return data, (test[0].to(device), test[1].to(device))


def dense_network(name: str, seed: int, data: Data, epochs: int, cache: Path | None) -> nn.Module:
    """Return the dense network, trained or as it was trained before."""
    file = cache / f"{name}-{seed}-{len(data[0])}-{epochs}.pt" if cache else None
    torch.manual_seed(seed)
    dense = NETWORKS[name]().to(data[0].device)
    if file is not None and file.is_file():
        dense.load_state_dict(torch.load(file, weights_only=True))
        return dense
    train_(dense, data, epochs, seed)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dense.state_dict(), file)
    return dense


def runs(
    name: str,
    seed: int,
    root: Path,
    length: Length,
    ways: list[str],
    done: set[Key],
    device: str,
    cache: Path | None,
) -> list[dict[str, Any]]:
    """Return a row for each way and budget that is not done yet."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = [(way, budget) for budget in BUDGETS for way in ways]
    wanted = [(way, budget) for way, budget in wanted if (name, way, budget, seed) not in done]
    if not wanted:
        return []
    data, test = load(root, length.images, seed, device)
    dense = dense_network(name, seed, data, length.dense, cache)
    full = macs(dense, data[0][:2])

    def goal(budget: float) -> float:
        if not length.is_work_equal:
            return budget
        small = copy.deepcopy(dense)
        return macs(torch_pruning(small, data, budget), data[0][:2]) / full

    def row(way: str, budget: float, model: nn.Module) -> dict[str, Any]:
        at = {"network": name, "way": way, "budget": budget, "seed": seed, "accuracy": accuracy(model, test)}
        params = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
        return at | {"macs": macs(model, data[0][:2]) / full, "params": params}

    rows = [] if (name, "dense", 1.0, seed) in done else [row("dense", 1.0, dense)]
    for way, budget in wanted:
        start = time.process_time()
        if way in SCRATCH:
            small = copy.deepcopy(dense)
            ours(small, data, goal(budget), scope=Local(), **SALIENCY)
            torch.manual_seed(seed + 100)
            for module in small.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            train_(small, data, SCRATCH[way](length), seed + 1)
        else:
            share = budget if way.startswith("Torch-Pruning") else goal(budget)
            small = WAYS[way](dense, data, share, length, seed)
        rows.append(row(way, budget, small) | {"cpu_seconds": round(time.process_time() - start, 1)})
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Return means and standard deviations over the seeds."""
    lines = []
    for name in NETWORKS:
        for way in ["dense", *WAYS, *SCRATCH]:
            line = {"network": name, "way": way}
            for budget in (1.0, *BUDGETS):
                found = [r for r in rows if (r["network"], r["way"], r["budget"]) == (name, way, budget)]
                values = [r["accuracy"] for r in found]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                share = statistics.mean(r["macs"] for r in found) if found else 0.0
                text = f"{statistics.mean(values):.2f} ± {spread:.2f} ({share:.0%})" if values else ""
                line[f"{budget:.0%} of the MACs"] = text
            if any(list(line.values())[2:]):
                lines.append(line)
    return table(lines)


def main() -> None:
    """Run what is not in the results file yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder with fashion_mnist.npz")
    parser.add_argument("--images", type=int, default=6000, help="training images, which each seed chooses")
    parser.add_argument("--epochs", type=int, nargs=2, default=[12, 2], help="of dense training, fine-tuning")
    parser.add_argument("--fine-lr", type=float, default=LR, help="learning rate of fine-tuning")
    parser.add_argument(
        "--equal-work", action="store_true", help="give all ways the work that Torch-Pruning's steps come to"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", default=[*WAYS, *SCRATCH], choices=[*WAYS, *SCRATCH])
    parser.add_argument("--cache", type=Path, help="folder for dense networks, to go on from")
    parser.add_argument("--out", type=Path, default=RESULTS / "structured_accuracy.json")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; each does one network with one seed"
    )
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(r["network"], r["way"], r["budget"], r["seed"]) for r in rows}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        length = Length(options.images, *options.epochs, options.fine_lr, options.equal_work)
        args = options.root, length, options.ways, done, options.device, options.cache
        todo = [pool.submit(runs, n, seed, *args) for seed in options.seeds for n in options.networks]
        for future in as_completed(todo):
            for row in future.result():
                rows.append(row)
                print(row, flush=True)
            options.out.write_text(json.dumps({**facts(options.seeds), "rows": rows}, indent=1) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
