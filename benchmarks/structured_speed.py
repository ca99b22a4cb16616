"""How much faster smaller networks are: latency and training steps at 50 % of the multiply-accumulates.

    python -m benchmarks.structured_speed

`shrink(budget=Budget(macs=0.5))` on ResNet-20, a tiny vision transformer, an MLP and a small GPT with fresh weights;
dense and small networks take turns, on one thread, in CPU time. Intervals are the median's, with 95 % confidence.
With `--device cuda` batches are 32 times as large, and it is the time on the clock, the device synchronised.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import facts, now, table, write
from lightning_prune import Budget, shrink
from lightning_prune.examples.networks import GPT, MLP, ResNet20
from lightning_prune.model.calls import Call
from lightning_prune.model.latency import median_interval
from lightning_prune.model.macs import count_macs


class ViT(nn.Module):
    """A vision transformer of width 192 and 6 layers on 32 x 32 images in patches of 4."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True)
        self.patch, self.head = nn.Conv2d(3, 192, 4, 4), nn.Linear(192, 10)
        self.token, self.position = (
            nn.Parameter(torch.zeros(1, 1, 192)),
            nn.Parameter(torch.randn(1, 65, 192) * 0.02),
        )
        self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[int], Tensor]]] = {
    "ResNet-20": (ResNet20, 16, lambda batch: torch.randn(batch, 3, 32, 32)),
    "ViT-tiny": (ViT, 16, lambda batch: torch.randn(batch, 3, 32, 32)),
    "MLP 784-1024-1024-10": (
        lambda: MLP((784, 1024, 1024, 10)),
        64,
        lambda batch: torch.randn(batch, 1, 28, 28),
    ),
    "GPT, 4 layers of 128": (GPT, 8, lambda batch: torch.randint(0, 65, (batch, 64))),
}
"""Name -> network, batch on a CPU, example."""


def seconds(function: Callable[[], Any], times: int, device: str) -> float:
    """Return the seconds of one call."""
    start = now(device)
    for _ in range(times):
        function()
    return (now(device) - start) / times


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of at least six values between the ends of its confidence interval of 95 %."""
    ends = median_interval(values)
    assert ends is not None
    return ends[0], statistics.median(values), ends[1]


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return one training step of a model."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        out = model(x).flatten(0, -2)
        F.cross_entropy(out, torch.zeros(len(out), dtype=torch.long, device=out.device)).backward()
        optimizer.step()

    return run


def call(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return one call of a model in eval mode."""

    def run() -> None:
        model.eval()
        with torch.inference_mode():
            model(x)

    return run


def measure(name: str, rounds: int, device: str) -> dict[str, Any]:
    """Shrink one network and let both take turns."""
    make, batch, example = NETWORKS[name]
    torch.manual_seed(0)
    dense, x = make().eval().to(device), example(batch if device == "cpu" else 32 * batch).to(device)
    small = copy.deepcopy(dense)
    plan = shrink(small, x, budget=Budget(macs=0.5))
    counted = [count_macs(m, Call(m, (x,), {})).total for m in (dense, small)]
    row: dict[str, Any] = {"batch": len(x), "macs": counted[1] / counted[0], "error": plan.error}
    row["params"] = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
    for what, of in (("call", call), ("step", step)):
        both = [of(dense, x), of(small, x)]
        seconds(both[1], 2, device)
        times = max(1, round(0.1 / seconds(both[0], 2, device)))
        found = [[seconds(run, times, device) for run in both] for _ in range(rounds)]
        row[what] = {
            "dense_ms": [1000 * t for t in median([a for a, _ in found])],
            "small_ms": [1000 * t for t in median([b for _, b in found])],
            "ratio": median([a / b for a, b in found]),
        }
    return row


def main() -> None:
    """Measure all networks and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.rounds < 6:
        parser.error(
            f"`--rounds` is at least 6, or the median has no interval of 95 %, but got {options.rounds}"
        )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {name: measure(name, options.rounds, options.device) for name in options.networks}
    shown = []
    for name, row in rows.items():
        line = {"network": name, "MACs": f"{row['macs']:.1%}", "parameters": f"{row['params']:.1%}"}
        for what in ("call", "step"):
            dense, small, ratio = (row[what][key] for key in ("dense_ms", "small_ms", "ratio"))
            line[f"{what}, ms before"] = f"{dense[1]:.2f} ({dense[0]:.2f} – {dense[2]:.2f})"
            line[f"{what}, ms after"] = f"{small[1]:.2f} ({small[0]:.2f} – {small[2]:.2f})"
            line[f"{what}, faster"] = f"{ratio[1]:.2f} ({ratio[0]:.2f} – {ratio[2]:.2f})"
        shown.append(line)
    print(table(shown))
    print(write("structured_speed", {**facts(0), "rounds": options.rounds, "networks": rows}))


if __name__ == "__main__":
    main()
