"""What structured pruning itself costs: CPU seconds and peak memory, and how both grow with depth.

    python -m benchmarks.structured_cost

Half of each group of ResNet-50, ViT-B/16 and DenseNet-121 (one image of 224 x 224) is taken out, each time in a fresh
process, beside Torch-Pruning where it is installed (the environment of the model zoo, benchmarks/README.md); after 300
CPU seconds it is ended. `verify` is the comparison of the small with the masked model in float64, which Torch-Pruning
has no counterpart of. Growth: llama layers of width 1536 on the meta device, traced and planned without any memory for
weights; with real ones ("ours-real"), as Torch-Pruning has, which runs the model, they are proved and cut as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import facts, table, write
from benchmarks.zoo.torchvision_ops import declare_operators

MODELS = ("torchvision/resnet50", "torchvision/vit_b_16", "torchvision/densenet121")
DEPTHS = (4, 8, 16, 32)
SECONDS = 300  # of CPU time for one measurement


def once(tool: str, name: str) -> dict[str, float]:
    """Prune one model and return the seconds of each part and the memory that came on top of the model."""
    from benchmarks import zoo

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    example = zoo.build(name)
    _warm_up(tool)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = _ours(example) if tool == "ours" else _torch_pruning(example)
    return row | {"extra MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def _warm_up(tool: str) -> None:
    """Load what the first use of a tool loads, so that it is not counted."""
    from benchmarks.zoo import Example

    small = Example(
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)).eval(), (torch.zeros(2, 4),)
    )
    _torch_pruning(small) if tool == "torch-pruning" else _ours(small)


def _seconds(row: dict[str, float], name: str, function: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = function()
    row[name] = time.process_time() - start
    return result


def _ours(example: Any, is_fake: bool = False) -> dict[str, float]:
    from lightning_prune.graph import trace
    from lightning_prune.model.equivalence import relative_error
    from lightning_prune.model.surgery import execute_

    row: dict[str, float] = {}
    couplings = _seconds(row, "trace", lambda: trace(example.model, example.args, example.kwargs))
    roles = ("channel", "head_dim")
    choice = {n: torch.arange(g.size) % 2 == 0 for n, g in couplings.groups.items() if g.role in roles}
    plan = _seconds(row, "plan", lambda: couplings.plan(choice))
    if is_fake:
        return row
    _seconds(row, "verify", lambda: relative_error(couplings, choice, plan))
    _seconds(row, "surgery", lambda: execute_(example.model, plan))
    return row


def _torch_pruning(example: Any) -> dict[str, float]:
    import torch_pruning as tp

    from benchmarks.zoo.tools import output_layers

    row: dict[str, float] = {}
    ignored = output_layers(example)
    pruner = _seconds(
        row,
        "trace",
        lambda: tp.pruner.BasePruner(
            example.model,
            example.args or example.kwargs,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=ignored,
        ),
    )
    _seconds(row, "surgery", pruner.step)
    return row


def depth(tool: str, num_layers: int) -> dict[str, float]:
    """Prune a llama of some depth; "ours" traces and plans it on the meta device."""
    declare_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.zoo import Example

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _warm_up(tool)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=4096,
        use_cache=False,
    )
    device = "meta" if tool == "ours" else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    row: dict[str, float] = {"params, M": sum(p.numel() for p in model.parameters()) / 1e6}
    example = Example(model, (), {"input_ids": torch.zeros(2, 16, dtype=torch.long, device=device)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row |= _torch_pruning(example) if tool == "torch-pruning" else _ours(example, is_fake=tool == "ours")
    return row | {"extra MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def fresh(*arguments: str) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.structured_cost", "--once", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return {"not done in, s": SECONDS}
    if done.returncode:
        return {"failed": 1.0}
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    """Measure all, the tools in turns, and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tools", nargs="+", default=["ours", "torch-pruning"])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS), help="llama layers")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        what, which = options.once
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, resource.RLIM_INFINITY))
        print(json.dumps(depth(what, int(which)) if which.isdigit() else once(what, which)))
        return
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(options.repeats):
        for name in options.models:
            for tool in options.tools:
                found.setdefault(name, {}).setdefault(tool, []).append(fresh(tool, name))
        for tool, num in ((t, num) for num in options.depths for t in (*options.tools, "ours-real")):
            tools = found.setdefault(f"llama, {num} layers", {})
            tools.setdefault(tool, []).append(fresh(tool, str(num)))
    rows = []
    for name, tools in found.items():
        for tool, runs in tools.items():
            middle = medians(runs)
            rows.append({"model": name, "tool": tool} | {k: f"{v:.2f}" for k, v in middle.items()})
    columns = dict.fromkeys(key for row in rows for key in row)
    print(table([{key: row.get(key, "") for key in columns} for row in rows]))
    print(write("structured_cost", {**facts(0), "repeats": options.repeats, "runs": found}))


if __name__ == "__main__":
    main()
