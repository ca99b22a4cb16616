"""What leaves the house: sizes of files, differences of exported programs, and what sparse kernels bring on a CPU.

    python -m benchmarks.export

Sizes: compressed safetensors against the same weights as safetensors, plain and after gzip. Programs: ONNX by
onnxruntime and torch.export against the model, on one thread, in turns. Kernels: `SparseLinear` against `nn.Linear`
with random weights and zeros in random places, both taking turns; ratios are medians and quartiles of the rounds.
"""

from __future__ import annotations

import argparse
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import facts, quartiles, table, write
from lightning_prune import SparseLinear, export_onnx, export_program, export_weights, prune
from lightning_prune.examples.networks import GPT, MLP, ConvNet, ResNet20
from lightning_prune.report.exports import Exported

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
HIGH = (0.8, 0.9, 0.95, 0.98, 0.99)
WIDTHS = ((1024, 1024), (2048, 2048), (4096, 1024), (4096, 4096))
BATCHES = (1, 16, 64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP 784-1024-1024-10": (lambda: MLP((784, 1024, 1024, 10)), lambda: torch.randn(16, 1, 28, 28)),
    "ConvNet": (ConvNet, lambda: torch.randn(16, 1, 8, 8)),
    "ResNet-20": (ResNet20, lambda: torch.randn(16, 3, 32, 32)),
    "GPT, 4 layers of 128": (lambda: GPT(vocab_size=65), lambda: torch.randint(0, 65, (8, 64))),
}


def sizes(name: str, folder: Path) -> list[dict[str, Any]]:
    """Export one network at each sparsity."""
    rows = []
    for sparsity in (0.0, *SPARSITIES):
        torch.manual_seed(0)
        model = NETWORKS[name][0]()
        if sparsity:
            prune(model, sparsity)
        plain = folder / "plain.safetensors"
        dense = export_weights(model, plain, compressed=False).num_bytes
        ours = export_weights(model, folder / "ours.safetensors").num_bytes
        zipped = len(zlib.compress(plain.read_bytes(), 6))
        rows.append(
            {"network": name, "sparsity": sparsity, "dense": dense, "gzip": zipped, "compressed": ours}
        )
    return rows


def programs(name: str, folder: Path) -> dict[str, Exported]:
    """Export one network, half of whose weights are zero, as ONNX and as a program."""
    torch.manual_seed(0)
    model, x = NETWORKS[name][0](), NETWORKS[name][1]()
    prune(model, 0.5)
    return {
        "onnx": export_onnx(model, x, folder / "a.onnx"),
        "pt2": export_program(model, x, folder / "a.pt2"),
    }


def seconds(function: Callable[[Tensor], Any], x: Tensor, times: int) -> float:
    """Return the CPU seconds of one call."""
    start = time.process_time()
    for _ in range(times):
        function(x)
    return (time.process_time() - start) / times


@torch.inference_mode()
def kernel(
    shape: tuple[int, int], sparsity: float, batches: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Let a dense layer and a sparse one take turns, for each batch size."""
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0]).eval()
    dense.weight.mul_(torch.rand(shape) >= sparsity)
    sparse = SparseLinear(dense)
    rows = []
    for batch in batches:
        x = torch.randn(batch, shape[1])
        both = (dense, sparse)
        times = [max(1, round(0.02 / seconds(module, x, 2))) for module in both]
        found = [[seconds(m, x, n) for m, n in zip(both, times, strict=True)] for _ in range(rounds)]
        rows.append(
            {
                "shape": shape,
                "sparsity": sparsity,
                "batch": batch,
                "dense_ms": [1000 * t for t in quartiles([a for a, _ in found])],
                "sparse_ms": [1000 * t for t in quartiles([b for _, b in found])],
                "ratio": quartiles([a / b for a, b in found]),
            }
        )
    return rows


def shown_sizes(rows: list[dict[str, Any]]) -> str:
    """Return sizes in kB, and in brackets as a fraction of the dense file."""

    def cell(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 1000:,.0f} ({row[key] / row['dense']:.3f})"

    names = ("gzip", "compressed")
    return table(
        [
            {
                "network": r["network"],
                "sparsity": f"{r['sparsity']:.0%}",
                "dense, kB": f"{r['dense'] / 1000:,.0f}",
            }
            | {f"{name}, kB": cell(r, name) for name in names}
            for r in rows
        ]
    )


def shown_programs(found: dict[str, dict[str, Exported]]) -> str:
    """Return differences, sizes and latencies."""
    rows = []
    for name, both in found.items():
        for format, one in both.items():
            assert one.before and one.after
            times = (f"{x.median_ms:.3g} ({x.low_ms:.3g} – {x.high_ms:.3g})" for x in (one.before, one.after))
            row = {"network": name, "format": format, "difference": f"{one.error:.1e}"}
            row |= dict(zip(("torch, ms", "file, ms"), times, strict=True))
            rows.append({**row, "file, kB": f"{one.num_bytes / 1000:,.0f}"})
    return table(rows)


def shown_kernels(rows: list[dict[str, Any]]) -> str:
    """Return one row for each layer and batch size, and a column for each sparsity."""
    grouped: dict[tuple[Any, ...], dict[float, Any]] = {}
    for row in rows:
        grouped.setdefault((*row["shape"], row["batch"]), {})[row["sparsity"]] = row
    lines = []
    for (out, inn, batch), by in grouped.items():
        first = next(iter(by.values()))
        line = {"layer": f"{out} x {inn}", "batch": str(batch), "dense, ms": f"{first['dense_ms'][1]:.3g}"}
        ratios = {s: row["ratio"] for s, row in by.items()}
        lines.append(line | {f"{s:.0%}": f"{r[1]:.2f} ({r[0]:.2f} – {r[2]:.2f})" for s, r in ratios.items()})
    return table(lines)


def main() -> None:
    """Run the parts that are asked for and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["sizes", "programs", "kernels"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record: dict[str, Any] = {**facts(0), "rounds": options.rounds}
    with TemporaryDirectory() as name:
        folder = Path(name)
        if "sizes" in options.parts:
            record["sizes"] = [row for network in NETWORKS for row in sizes(network, folder)]
            print(shown_sizes(record["sizes"]))
        if "kernels" in options.parts:
            record["kernels"] = [
                row for shape in WIDTHS for s in HIGH for row in kernel(shape, s, BATCHES, options.rounds)
            ]
            print(shown_kernels(record["kernels"]))
        if "programs" in options.parts:
            found = {network: programs(network, folder) for network in NETWORKS}
            print(shown_programs(found))
            record["programs"] = {
                network: {
                    f: {**vars(e), "before": vars(e.before), "after": vars(e.after), "path": ""}
                    for f, e in both.items()
                }
                for network, both in found.items()
            }
    print(write("export", record))


if __name__ == "__main__":
    main()
