"""What only a GPU can tell: the kernels of its sparse tensor cores, and selection where the weights lie there.

    python -m benchmarks.gpu

`kernels`: one linear layer, 2:4 by magnitude, in float16, against its dense self, for several numbers of rows.
`models`: feed-forward blocks of transformers as a whole, through `to_semi_structured`, which converts what is faster.
`selection`: the largest 10 % of all weights, as in `benchmarks.selection`. Times are on the clock, the device
synchronised.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from benchmarks.record import facts, quartiles, table, write
from lightning_prune import NofM, prune, to_semi_structured
from lightning_prune.core.selection import keep_top
from lightning_prune.core.types import LazyScores
from lightning_prune.model.calls import Call
from lightning_prune.model.latency import measure_latencies
from lightning_prune.model.semi_structured import semi_structured

SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (16, 256, 2048, 8192)
NUM_TENSORS = 24


def kernels() -> list[dict[str, Any]]:
    """Measure single layers."""
    rows = []
    for out_features, in_features in SHAPES:
        layer = nn.Linear(in_features, out_features, device="cuda", dtype=torch.float16)
        prune(layer, scope=NofM(2, 4))
        sparse = semi_structured(layer)
        for num_rows in ROWS:
            x = torch.randn(num_rows, in_features, device="cuda", dtype=torch.float16)
            with torch.inference_mode():
                wanted, got = layer(x).float(), sparse(x).float()
                dense, fast = measure_latencies(Call(layer, (x,), {}), Call(sparse, (x,), {}), seconds=0.2)
            error = float((wanted - got).abs().max() / wanted.abs().max())
            times = {"dense_us": 1e3 * dense.median_ms, "sparse_us": 1e3 * fast.median_ms}
            low, high = dense.low_ms / fast.high_ms, dense.high_ms / fast.low_ms
            rows.append({"out": out_features, "in": in_features, "rows": num_rows, **times, "error": error})
            rows[-1] |= {"faster": dense.median_ms / fast.median_ms, "between": (low, high)}
    return rows


class FeedForward(nn.Module):
    """The wide half of transformer blocks."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            for _ in range(num_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def models() -> list[dict[str, Any]]:
    """Convert whole models."""
    rows = []
    for width, num_rows in ((1024, 4096), (4096, 4096), (4096, 64)):
        model = FeedForward(width, 4).cuda().half().eval()
        prune(model, scope=NofM(2, 4))
        found = to_semi_structured(model, torch.randn(num_rows, width, device="cuda").half())
        row = {
            "width": width,
            "rows": num_rows,
            "layers": len(found.layers),
            "converted": found.num_converted,
        }
        if found.before is not None and found.after is not None:
            row |= {
                "before_ms": found.before.median_ms,
                "after_ms": found.after.median_ms,
                "error": found.error,
            }
        rows.append(row)
    return rows


def tensors(total: int) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(total // NUM_TENSORS, device="cuda", generator=draw) for _ in range(NUM_TENSORS)]


def ours(weights: list[Tensor], num_keep: int) -> Any:
    shapes = {str(i): tuple(weight.shape) for i, weight in enumerate(weights)}
    return keep_top(LazyScores(shapes, lambda name: weights[int(name)].abs()), num_keep)


def by_torch(weights: list[Tensor], num_keep: int) -> Any:
    layers = [nn.Module() for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight)
    removed = sum(weight.numel() for weight in weights) - num_keep
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=removed
    )
    return layers


def by_topk(weights: list[Tensor], num_keep: int) -> Any:
    scores = torch.cat([weight.abs() for weight in weights])
    mask = torch.zeros(len(scores), dtype=torch.bool, device="cuda")
    mask[scores.topk(num_keep, sorted=False).indices] = True
    return mask.split([weight.numel() for weight in weights])


SELECTING: dict[str, Callable[[list[Tensor], int], Any]] = {
    "keep_top": ours,
    "torch.nn.utils.prune.global_unstructured": by_torch,
    "concatenate, topk": by_topk,
}


def selection(repeats: int = 5) -> list[dict[str, Any]]:
    """Select in turns, and measure the memory beside the weights."""
    rows = []
    for total in (10**7, 10**8, 10**9):
        weights = tensors(total)
        found: dict[str, list[float]] = {way: [] for way in SELECTING}
        memory = dict.fromkeys(SELECTING, 0)
        for turn in range(repeats + 1):
            for way, select in SELECTING.items():
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                torch.cuda.synchronize()
                start = time.perf_counter()
                try:
                    masks = select(weights, total // 10)
                except torch.cuda.OutOfMemoryError:
                    found[way], memory[way] = [float("nan")], 0
                    continue
                torch.cuda.synchronize()
                found[way] += [time.perf_counter() - start] if turn else []
                memory[way] = torch.cuda.max_memory_allocated() - before
                del masks
        for way, times in found.items():
            rows.append(
                {"weights": total, "way": way, "seconds": quartiles(times), "extra_bytes": memory[way]}
            )
    return rows


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "kernels": kernels,
    "models": models,
    "selection": selection,
}


def shown(row: dict[str, Any]) -> dict[str, str]:
    return {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()}


def main() -> None:
    """Measure, print the tables and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    record = facts(0)
    for part in options.parts:
        record[part] = PARTS[part]()
        print(f"\n{part}\n{table([shown(row) for row in record[part]])}", flush=True)
    print(write("gpu", record).name)


if __name__ == "__main__":
    main()
