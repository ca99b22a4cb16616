"""What only a GPU can tell: masking, the kernels of its sparse tensor cores, and selection, where weights lie there.

    python -m benchmarks.gpu

`masking`: applying the masks of all weights of a network, what it costs the processor that starts it and the GPU that
does it.
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

from benchmarks.record import facts, quartiles, table, write
from benchmarks.selection import NUM_TENSORS, global_unstructured, keep_top, topk
from lightning_prune import NofM, prune, to_semi_structured
from lightning_prune.model import fused, fused_kernel
from lightning_prune.model.apply import apply_masks_
from lightning_prune.model.calls import Call
from lightning_prune.model.latency import measure_latencies
from lightning_prune.model.semi_structured import semi_structured

SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))
ROWS = (64, 1024, 8192)
WEIGHTS: dict[str, list[tuple[int, ...]]] = {
    "LeNet-300-100": [(300, 784), (100, 300), (10, 100)],
    "MLP of 10 M": [(2048, 784), (2048, 2048), (2048, 2048), (10, 2048)],
    "ResNet-56": [(16 << i // 18, 16 << i // 18, 3, 3) for i in range(54)],
    "GPT of 85 M": [
        shape for _ in range(12) for shape in [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    ],
}


def fill(weights: list[Tensor], masks: list[Tensor]) -> None:
    for weight, mask in zip(weights, masks, strict=True):
        weight.masked_fill_(mask.logical_not(), 0.0)


def where(weights: list[Tensor], masks: list[Tensor]) -> None:
    for weight, mask in zip(weights, masks, strict=True):
        torch.where(mask, weight, weight.new_zeros(()), out=weight)


def integers(weights: list[Tensor], masks: list[Tensor]) -> None:
    torch._foreach_mul_(
        [weight.view(torch.int32) for weight in weights], [mask.view(torch.uint8) for mask in masks]
    )


def anew(weights: list[Tensor], masks: list[Tensor]) -> None:
    pieces = [(w.data_ptr(), m.data_ptr(), w.numel()) for w, m in zip(weights, masks, strict=True)]
    table = fused.table_of(tuple(pieces), 4, weights[0].get_device())
    fused_kernel.KERNELS[4][(len(table), 1, 1)](table)


def floats(weights: list[Tensor], masks: list[Tensor]) -> None:
    torch._foreach_mul_(weights, masks)


MASKING: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
    "apply_masks_": apply_masks_,
    "our kernel": fused.zero_pruned_,
    "our kernel, found anew by Triton": anew,
    "_foreach_mul_ of integers": integers,
    "_foreach_mul_ by bools": floats,
    "_foreach_mul_ by floats": floats,
    "masked_fill_ one by one": fill,
    "where one by one": where,
}


@torch.no_grad()
def masking(repeats: int = 9, calls: int = 5) -> list[dict[str, Any]]:
    """Start each way some times in a row, and see when the processor is through and when the GPU is."""
    rows = []
    for network, shapes in WEIGHTS.items():
        weights = [torch.randn(shape, device="cuda") for shape in shapes]
        bools = [torch.rand(shape, device="cuda") > 0.9 for shape in shapes]
        for way, mask_ in MASKING.items():
            masks = [mask.float() for mask in bools] if way.endswith("floats") else bools
            host, device = list[float](), list[float]()
            for _ in range(repeats + 1):
                torch.cuda.synchronize()
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(20_000_000)  # so that all calls wait in the queue when the first one begins
                events[0].record()
                start = time.perf_counter()
                for _ in range(calls):
                    mask_(weights, masks)
                host.append((time.perf_counter() - start) / calls)
                events[1].record()
                torch.cuda.synchronize()
                device.append(events[0].elapsed_time(events[1]) / calls / 1e3)
            host_us, device_us = (1e6 * quartiles(found[1:])[1] for found in (host, device))
            rows.append({"network": network, "tensors": len(shapes), "way": way})
            rows[-1] |= {"host_us": host_us, "gpu_us": device_us}
            print(rows[-1], flush=True)
    return rows


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
                dense, fast = measure_latencies(Call(layer, (x,), {}), Call(sparse, (x,), {}), seconds=0.05)
            error = float((wanted - got).abs().max() / wanted.abs().max())
            times = {"dense_us": 1e3 * dense.median_ms, "sparse_us": 1e3 * fast.median_ms}
            low, high = dense.low_ms / fast.high_ms, dense.high_ms / fast.low_ms
            rows.append({"out": out_features, "in": in_features, "rows": num_rows, **times, "error": error})
            rows[-1] |= {"faster": dense.median_ms / fast.median_ms, "between": (low, high)}
            print(rows[-1], flush=True)
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
        found = to_semi_structured(model, torch.randn(num_rows, width, device="cuda").half(), seconds=0.05)
        before, after = (None if cost is None else cost.median_ms for cost in (found.before, found.after))
        row = {
            "width": width,
            "rows": num_rows,
            "layers": len(found.layers),
            "converted": found.num_converted,
        }
        row |= {"before_ms": before, "after_ms": after, "error": found.error}
        rows.append(row)
        print(row, flush=True)
    return rows


def tensors(total: int) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(total // NUM_TENSORS, device="cuda", generator=draw) for _ in range(NUM_TENSORS)]


SELECTING = {
    "keep_top": keep_top,
    "torch.nn.utils.prune.global_unstructured": global_unstructured,
    "concatenate, topk": topk,
}


def selection(repeats: int = 3) -> list[dict[str, Any]]:
    """Select in turns, and measure the memory beside the weights."""
    rows = []
    for total in (10**7, 10**8):
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
    "masking": masking,
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
