"""Selecting the largest weights of a network, all layers competing: `python -m benchmarks.selection`.

Each run is a process of its own, on one thread: it makes 24 tensors, notes its peak memory, selects, and reports the
CPU seconds and by how much the peak has grown. The ways take turns. What each returns is checked afterwards, without a
sort: exactly k kept, all above the threshold among them, and whether the ties kept are the first ones.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import facts, quartiles, table, write

if TYPE_CHECKING:  # the parent process must stay small: a child's peak starts from its parent's
    from torch import Tensor

NUM_TENSORS = 24
SLOW = "global_unstructured"


def keep_top(weights: list[Tensor], num_keep: int) -> list[Tensor]:
    """As a pruner does it: scores are computed when they are read."""
    from lightning_prune.core.criteria.weights import Magnitude
    from lightning_prune.core.granularities import Weight
    from lightning_prune.core.scoring import group_scores
    from lightning_prune.core.selection import keep_top

    shapes = {str(i): tuple(w.shape) for i, w in enumerate(weights)}
    stats = {name: {"weight": w} for name, w in zip(shapes, weights, strict=True)}
    masks = keep_top(group_scores(stats, shapes, criterion=Magnitude(), granularity=Weight()), num_keep)
    return list(masks.values())


def global_unstructured(weights: list[Tensor], num_keep: int) -> list[Tensor]:
    from torch import nn
    from torch.nn.utils import prune

    modules = [nn.Module() for _ in weights]
    for module, weight in zip(modules, weights, strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    num_pruned = sum(w.numel() for w in weights) - num_keep
    prune.global_unstructured(
        [(module, "weight") for module in modules], prune.L1Unstructured, amount=num_pruned
    )
    return [module.weight_mask for module in modules]


def topk(weights: list[Tensor], num_keep: int) -> list[Tensor]:
    import torch

    scores = torch.cat([w.abs().flatten() for w in weights])
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask[scores.topk(num_keep, sorted=False).indices] = True
    return [
        part.view(w.shape) for part, w in zip(mask.split([w.numel() for w in weights]), weights, strict=True)
    ]


def kthvalue(weights: list[Tensor], num_keep: int) -> list[Tensor]:
    """Keeps all ties, so more than asked for where there are any."""
    import torch

    scores = torch.cat([w.abs().flatten() for w in weights])
    threshold = scores.kthvalue(scores.numel() - num_keep + 1).values
    mask = scores >= threshold
    return [
        part.view(w.shape) for part, w in zip(mask.split([w.numel() for w in weights]), weights, strict=True)
    ]


WAYS: dict[str, Callable[[list[Tensor], int], list[Tensor]]] = {
    "keep_top": keep_top,
    SLOW: global_unstructured,
    "cat + topk": topk,
    "cat + kthvalue": kthvalue,
}


def check(weights: list[Tensor], masks: list[Tensor], num_keep: int) -> dict[str, Any]:
    """Tell whether masks keep exactly the `num_keep` largest, and of the ties the first."""
    masks = [mask.bool() for mask in masks]
    threshold = min(w.abs()[mask].min() for w, mask in zip(weights, masks, strict=True) if mask.any())
    num_kept, num_above, num_above_kept, ties_kept = 0, 0, 0, list[bool]()
    for weight, mask in zip(weights, masks, strict=True):
        magnitude = weight.abs()
        above, equal = magnitude > threshold, magnitude == threshold
        num_kept += int(mask.sum())
        num_above += int(above.sum())
        num_above_kept += int((mask & above).sum())
        ties_kept += mask[equal].tolist()
    return {
        "exact": num_kept == num_keep and num_above == num_above_kept,
        "kept_too_many": num_kept - num_keep,
        "ties": len(ties_kept),
        "first_ties_kept": ties_kept == sorted(ties_kept, reverse=True),
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(way: str, size: int, sparsity: float, seed: int) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    width = 1024
    height = size // (NUM_TENSORS * width)
    weights = [torch.randn(height, width, generator=generator) for _ in range(NUM_TENSORS)]
    size = sum(w.numel() for w in weights)
    num_keep = size - round(sparsity * size)
    WAYS[way]([torch.randn(8, 8)], 8)  # imports what it needs
    before, start = peak(), time.process_time()
    masks = WAYS[way](weights, num_keep)
    seconds, after = time.process_time() - start, peak()
    return {"seconds": seconds, "bytes": after - before, "size": size} | check(weights, masks, num_keep)


def spawn(way: str, size: int, sparsity: float, seed: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    arguments = [way, str(size), str(sparsity), str(seed)]
    command = [sys.executable, "-m", "benchmarks.selection", "--worker", *arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def measure(size: int, ways: list[str], args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(args.repeats):
        for way in ways:
            if way != SLOW or number < args.slow_repeats:
                runs[way].append(spawn(way, size, args.sparsity, args.seed + number))
    return {"size": size, "runs": runs}


def show(way: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    low, seconds, high = quartiles([run["seconds"] for run in runs[way]])
    _, ours, _ = quartiles([run["seconds"] for run in runs["keep_top"]])
    _, num_bytes, _ = quartiles([run["bytes"] for run in runs[way]])
    _, our_bytes, _ = quartiles([run["bytes"] for run in runs["keep_top"]])
    first = runs[way][0]
    return {
        "way": way,
        "runs": str(len(runs[way])),
        "CPU s": f"{seconds:.3f}",
        "quartiles": f"{low:.3f} – {high:.3f}",
        "to ours": f"{seconds / ours:.1f}",
        "peak extra MB": f"{num_bytes / 1e6:.0f}",
        "memory to ours": f"{num_bytes / our_bytes:.1f}" if our_bytes else "–",
        "keeps exactly the k largest": "yes" if all(run["exact"] for run in runs[way]) else "no",
        "first of the ties": f"{'yes' if all(run['first_ties_kept'] for run in runs[way]) else 'no'} ({first['ties']})",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument(
        "--sizes", nargs="*", type=float, default=[1e7, 1e8], help="numbers of weights, all ways"
    )
    parser.add_argument(
        "--growth",
        nargs="*",
        type=float,
        default=[1e6, 3e6, 3e7, 3e8, 1e9],
        help="more numbers, ours alone; 1e9 take 5 GB",
    )
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=2, help="of global_unstructured")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.worker:
        way, size, sparsity, seed = args.worker
        print(json.dumps(work(way, int(size), float(sparsity), int(seed))))
        return
    record = facts(args.seed) | {"sparsity": args.sparsity, "compared": [], "growth": []}
    for size in map(int, args.sizes):
        record["compared"].append(measure(size, list(WAYS), args))
        runs = record["compared"][-1]["runs"]
        print(f"\n{size:,} weights, {args.sparsity:.0%} sparsity")
        print(table([show(way, runs) for way in WAYS]), flush=True)
    if args.growth:
        record["growth"] = [measure(int(size), ["keep_top"], args) for size in args.growth]
        sizes = sorted(record["growth"] + record["compared"], key=lambda measured: measured["size"])
        print(f"\n{table([show_growth(measured) for measured in sizes])}")
    print(f"\n{write('selection', record).name}")


def show_growth(measured: dict[str, Any]) -> dict[str, str]:
    runs = measured["runs"]["keep_top"]
    low, seconds, high = quartiles([run["seconds"] for run in runs])
    _, num_bytes, _ = quartiles([run["bytes"] for run in runs])
    size = runs[0]["size"]
    return {
        "weights": f"{measured['size']:,}",
        "CPU s": f"{seconds:.3f}",
        "quartiles": f"{low:.3f} – {high:.3f}",
        "ns a weight": f"{seconds / size * 1e9:.1f}",
        "peak extra MB": f"{num_bytes / 1e6:.1f}",
        "bytes a weight": f"{num_bytes / size:.2f}",
    }


if __name__ == "__main__":
    main()
