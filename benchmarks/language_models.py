"""One-shot pruning of a small GPT: perplexity after each method, and the memory of SparseGPT as models get deeper.

    python -m benchmarks.language_models --root ../shared/data
    python -m benchmarks.language_models --root ../shared/data --data wikitext2

A GPT of 4 layers and width 128 is trained on tiny-shakespeare, or on WikiText-2 by bytes, for 1000 steps (once; the
checkpoint is kept under --cache) and pruned by the recipes of `conf/pruning`, without any training after: what
`python train.py train=false` does. The second table prunes untrained GPTs of growing depth: the most that all tensors
take at once beside the weights, and what the Gram matrices of all layers together would take.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.record import RESULTS, facts, table
from lightning_prune import Local, SparseGPT, cli, prune
from lightning_prune.examples.networks import GPT

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["model=gpt", "logger=none", "trainer.accelerator=cpu"]
COMMON += [
    "trainer.enable_progress_bar=false",
    "callbacks.monitor.latency=false",
    "callbacks.monitor.show=false",
]
EXCLUDED = "pruning.exclude=[network.embedding, network.positions, network.head]"
METHODS = {
    "magnitude, per layer": ["one_shot", "pruning/scope=local"],
    "magnitude, global": ["one_shot"],
    "Wanda": ["wanda"],
    "Wanda, OWL": ["owl"],
    "least squares after magnitude, per layer": ["reconstruct", "pruning/scope=local"],
    "least squares after Wanda": ["wanda", "pruning/solver=least_squares"],
    "SparseGPT": ["sparsegpt"],
    "ALPS": ["alps"],
    "WoodFisher": [
        "wood_fisher",
        "pruning.num_calibration_batches=16",
    ],  # 64 would take 16 x 64 backward passes
}
DATA = {
    "tinyshakespeare": ["data=tinyshakespeare"],
    "wikitext2": ["data=wikitext2", "model.vocab_size=256"],
}
PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
ANCHORS = {  # by hand-made loops on another training of the same network; dense 6.303
    "magnitude, per layer": {"50%": 6.845, "60%": 7.970, "70%": 10.98, "2:4": 8.792, "4:8": 7.724},
    "magnitude, global": {"50%": 6.757, "60%": 7.555, "70%": 9.71},
    "Wanda": {"50%": 6.891, "60%": 8.229, "70%": 12.47, "2:4": 8.877, "4:8": 7.745},
    "SparseGPT": {"50%": 6.554, "60%": 7.102, "70%": 9.14, "2:4": 7.107, "4:8": 6.732},
}
DEPTHS = (2, 4, 8, 16)
WIDTH = 256


def run(words: list[str], data: str, root: str) -> dict[str, Any]:
    """Do what the command line says, in a folder that goes."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*COMMON, *DATA[data], *words, f"data.root={root}", f"hydra.runtime.output_dir={folder}"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", words, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = cli.train(cfg)
    assert isinstance(metrics, dict)
    return metrics


def trained(data: str, root: str, cache: Path, steps: int, seed: int) -> Path:
    """Return a checkpoint of the dense model; a training that was interrupted goes on from its last hundred steps."""
    path, part = (cache / f"gpt-{data}-{steps}-{seed}{end}.ckpt" for end in ("", "-part"))
    if not path.is_file():
        words = [f"+trainer.max_steps={steps}", "trainer.max_epochs=-1", "+trainer.limit_val_batches=0"]
        words += [f"seed={seed}", f"callbacks.checkpoint.dirpath={cache}", "test=false"]
        every = math.gcd(steps, 100)
        words += [
            f"callbacks.checkpoint.filename={part.stem}",
            f"+callbacks.checkpoint.every_n_train_steps={every}",
        ]
        run([*words, f"ckpt_path={part}"] if part.is_file() else words, data, root)
        part.rename(path)
    return path


def prunings(sparsities: list[float]) -> list[tuple[str, str, list[str]]]:
    """Return method, cell and what the command line says, of all runs."""
    found = [("dense", "", ["pruning=one_shot", "pruning.sparsity=0.0"])]
    for method, (recipe, *more) in METHODS.items():
        for sparsity in sparsities:
            found.append(
                (method, f"{sparsity:.0%}", [f"pruning={recipe}", *more, f"pruning.sparsity={sparsity}"])
            )
        if method in ("magnitude, global", "Wanda, OWL"):  # patterns set the sparsity of each layer
            continue
        others = [word for word in more if "scope" not in word]
        for cell, (n, m) in PATTERNS.items():
            scope = [
                "pruning/scope=n_of_m",
                f"pruning.scope.n={n}",
                f"pruning.scope.m={m}",
                "pruning.sparsity=null",
            ]
            found.append((method, cell, [f"pruning={recipe}", *others, *scope]))
    return found


class LiveBytes(TorchDispatchMode):
    """The most that tensors take at once which operations make inside of it, beyond those that were there before.

    Args:
        there: tensors that are not counted.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.there = {t.untyped_storage()._cdata for t in there}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves(output) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            known = self.live.get(storage._cdata)
            if storage._cdata in self.there or (known is not None and not known[0].expired()):
                continue
            self.total += storage.nbytes() - (known[1] if known is not None else 0)
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.total > self.peak:
            self.live = {key: found for key, found in self.live.items() if not found[0].expired()}
            self.total = sum(size for _, size in self.live.values())
            self.peak = max(self.peak, self.total)
        return output


def measure_memory(depth: int) -> dict[str, Any]:
    """Prune an untrained GPT by SparseGPT, and return what its tensors take at most."""
    torch.manual_seed(0)
    model = GPT(num_layers=depth, width=WIDTH, num_heads=4).eval()
    batches = [torch.randint(0, 65, (8, 128)) for _ in range(8)]
    start, parameters = time.process_time(), dict(model.named_parameters())
    with LiveBytes([*parameters.values(), *batches]) as seen:
        masks = prune(model, 0.5, scope=Local(), solver=SparseGPT(), batches=batches, exclude=["head"])
    grams = sum(p.shape[1] ** 2 * 8 for n, p in parameters.items() if p.dim() == 2 and "blocks" in n)
    return {
        "layers": depth,
        "weights, MB": sum(p.numel() * 4 for p in parameters.values()) / 1e6,
        "peak beside them, MB": seen.peak / 1e6,
        "of it masks, MB": sum(mask.numel() for mask in masks.values()) / 1e6,
        "Gram matrices of all layers, MB": grams / 1e6,
        "CPU s": time.process_time() - start,
    }


def summary(record: dict[str, Any]) -> str:
    """Return both tables."""
    dense, rows = record["rows"][0]["perplexity"], record["rows"][1:]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    lines = []
    for method in METHODS:
        line = {"method": method}
        for cell in cells:
            found = [row["perplexity"] for row in rows if (row["method"], row["cell"]) == (method, cell)]
            known = ANCHORS.get(method, {}).get(cell) if record["data"] == "tinyshakespeare" else None
            told = f" (hand-made {known / 6.303:.3f})" if known else ""
            line[cell] = f"{found[0]:.3f}, {found[0] / dense:.3f}x{told}" if found else "–"
        lines.append(line)
    memory = [{key: f"{value:.4g}" for key, value in row.items()} for row in record["memory"]]
    return f"dense {dense:.3f}\n\n{table(lines)}\n\n" + (table(memory) if memory else "")


def main() -> None:
    """Train if need be, prune in every way that is not done yet, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=str(ROOT / "data"), help="folder with the data files")
    parser.add_argument("--data", default="tinyshakespeare", choices=list(DATA))
    parser.add_argument("--cache", type=Path, default=Path("outputs/language_models"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--cells", nargs="+", help="such as 50%% or 2:4; by default all")
    parser.add_argument("--out", type=Path, help="by default in benchmarks/results")
    options = parser.parse_args()
    ending = "" if options.data == "tinyshakespeare" else f"_{options.data}"
    options.out = options.out or RESULTS / f"language_models{ending}.json"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    path = trained(options.data, options.root, options.cache.resolve(), options.steps, options.seed)
    known = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": [], "memory": []}
    record = {**known, **facts(options.seed), "data": options.data}
    for method, cell, words in prunings(options.sparsities):
        is_wanted = method in ("dense", *options.methods) and (not cell or cell in (options.cells or [cell]))
        if not is_wanted or any((row["method"], row["cell"]) == (method, cell) for row in record["rows"]):
            continue
        start = time.process_time()
        found = run(
            [*words, EXCLUDED, "train=false", "test=false", f"ckpt_path={path}"], options.data, options.root
        )
        seconds = time.process_time() - start
        row = {
            "method": method,
            "cell": cell,
            "perplexity": found["val/perplexity"],
            "cpu_seconds": round(seconds, 1),
        }
        record["rows"].append(row)
        print(row, flush=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    for depth in DEPTHS if options.data == "tinyshakespeare" else ():
        if not any(row["layers"] == depth for row in record["memory"]):
            record["memory"].append(measure_memory(depth))
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(summary(record))


if __name__ == "__main__":
    main()
