"""What it costs, per training step, to keep a network 90 % sparse: `python -m benchmarks.overhead`.

All ways of masking train the same network on the same batch in turns, a few steps each, on one thread; the time is
CPU time. A ratio compares a turn with the turn of plain training in the same round. fasterai takes part where it is
installed (`pip install --no-deps fasterai fastcore einops`, and what it then asks for, in an environment of its own).
With `--device cuda` it is the time on the clock, the device synchronised before and after a turn. What a way adds to a
step does not depend on the batch: with `--batch 1` it shows where the network's own work would drown it.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from benchmarks.record import facts, now, quartiles, table, write
from lightning_prune.core.selection import keep_top
from lightning_prune.core.types import LazyScores, Masks
from lightning_prune.examples.networks import GPT, MLP, ResNet20
from lightning_prune.model import compact
from lightning_prune.model.apply import apply_masks_
from lightning_prune.model.compact import CompactSteps

SPARSITY = 0.9
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet": (MLP, (128, 1, 28, 28), 4),
    "mlp": (lambda: MLP((784, 2048, 2048, 2048, 10)), (32, 1, 28, 28), 4),
    "resnet": (ResNet20, (64, 3, 32, 32), 1),
    "gpt": (lambda: GPT(4096, 256, num_layers=12, num_heads=12, width=768), (8, 256), 1),
}
"""Name -> network, shape of a batch, measured steps of a turn; the GPT, of 85 M weights in its blocks, is for a GPU."""
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
}
Measure = Callable[[argparse.Namespace, str, str], dict[str, Any]]
"""(the command line's options, network, optimizer) -> a run."""
Make = Callable[[nn.Module, Masks, Callable[[nn.Module], torch.optim.Optimizer]], torch.optim.Optimizer]


def after_step(mask_: Callable[[list[Tensor], list[Tensor]], Any], dtype: torch.dtype = torch.bool) -> Make:
    """Mask the weights in place after each step."""

    def make(model: nn.Module, masks: Masks, optimizer_of: Any) -> torch.optim.Optimizer:
        parameters = dict(model.named_parameters())
        weights, kept = [parameters[name] for name in masks], [mask.to(dtype) for mask in masks.values()]

        def timed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            start = time.process_time()
            mask_(weights, kept)
            optimizer.masking.append(time.process_time() - start)

        optimizer = optimizer_of(model)
        optimizer.masking = []
        optimizer.register_step_post_hook(timed)
        return optimizer

    return make


@torch.no_grad()
def foreach(weights: list[Tensor], masks: list[Tensor]) -> None:
    torch._foreach_mul_(weights, masks)


def all_compactly(model: nn.Module, masks: Masks, optimizer_of: Any) -> torch.optim.Optimizer:
    """Step the survivors of all weights alone, wherever they lie."""
    with mock.patch.object(compact, "is_worth_it", return_value=True):
        return compactly(model, masks, optimizer_of)


def compactly(model: nn.Module, masks: Masks, optimizer_of: Any) -> torch.optim.Optimizer:
    """What our callbacks do: the survivors are stepped alone where that is worth it, the rest is masked."""
    parameters = dict(model.named_parameters())
    optimizer = optimizer_of(model)
    steps = CompactSteps(optimizer)
    steps.follow({name: parameters[name] for name in masks}, masks)

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        done = steps.masked
        rest = [name for name in masks if id(parameters[name]) not in done]
        apply_masks_([parameters[name].detach() for name in rest], [masks[name] for name in rest])

    optimizer.register_step_post_hook(after)
    return optimizer


def by_forward_hook(model: nn.Module, masks: Masks, optimizer_of: Any) -> torch.optim.Optimizer:
    """torch.nn.utils.prune, which Lightning's ModelPruning calls."""
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name.rpartition(".")[0]), "weight", mask)
    return optimizer_of(model)


def by_parametrization(model: nn.Module, masks: Masks, optimizer_of: Any) -> torch.optim.Optimizer:
    """torch.ao.pruning."""
    from torch.ao.pruning import WeightNormSparsifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = WeightNormSparsifier(sparsity_level=0.0)
        sparsifier.prepare(model, [{"tensor_fqn": name} for name in masks])
    for name, mask in masks.items():
        model.get_submodule(name.rpartition(".")[0]).parametrizations["weight"][0].mask = mask.float()
    return optimizer_of(model)


def by_fasterai(model: nn.Module, masks: Masks, optimizer_of: Any) -> torch.optim.Optimizer:
    """What fasterai's SparsifyCallback does behind each step, without fastai's training loop."""
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier

    sparsifier = Sparsifier(model, "weight", "global", large_final, layer_type=(nn.Linear, nn.Conv2d))
    for name, mask in masks.items():
        model.get_submodule(name.rpartition(".")[0]).register_buffer("_mask", mask.float())
    optimizer = optimizer_of(model)
    optimizer.register_step_post_hook(lambda *_: sparsifier._apply_masks())
    return optimizer


WAYS: dict[str, Make] = {
    "plain": lambda model, masks, optimizer_of: optimizer_of(model),
    "ours": compactly,
    "ours, compact=False": after_step(apply_masks_),
    "torch.nn.utils.prune (ModelPruning)": by_forward_hook,
    "torch.ao.pruning": by_parametrization,
    **({"fasterai": by_fasterai} if find_spec("fasterai") else {}),
    "_foreach_mul_, float masks": after_step(foreach, torch.float32),
    "_foreach_mul_, bool masks": after_step(foreach),
}
ON_GPU: dict[str, Make] = {
    "ours, survivors stepped alone": all_compactly,
}
"""More ways, of interest on a GPU alone."""


def live_bytes() -> int:
    """Return the bytes that all tensors in this process hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
        grads = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors + grads)}
    return sum(storages.values())


def magnitude_masks(model: nn.Module) -> Masks:
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
    scores = LazyScores(
        {name: tuple(w.shape) for name, w in weights.items()}, lambda name: weights[name].abs()
    )
    total = sum(w.numel() for w in weights.values())
    return keep_top(scores, total - round(SPARSITY * total))


@dataclass(frozen=True)
class At:
    """How networks train: the device, whether in bfloat16 by autocast, whether compiled, and on how many examples."""

    device: str = "cpu"
    is_mixed: bool = False
    is_compiled: bool = False
    batch: int | None = None

    @property
    def ways(self) -> dict[str, Make]:
        return WAYS if self.device == "cpu" else WAYS | ON_GPU


@dataclass
class Built:
    """A network in training: a function that makes one step, and the bytes that its tensors hold."""

    step: Callable[[], None]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    live_bytes: int


def build(network: str, way: str, optimizer: str, seed: int, at: At) -> Built:
    make_model, usual, _ = NETWORKS[network]
    shape = (at.batch or usual[0], *usual[1:])
    gc.collect()
    before = live_bytes()
    torch.manual_seed(seed)
    with torch.device(at.device):
        model = make_model()
    inputs, labels = torch.randn(shape), torch.randint(10, shape[:1])
    if network == "gpt":
        inputs, labels = torch.randint(4096, shape), torch.randint(4096, (shape[0] * shape[1],))
    inputs, labels = inputs.to(at.device), labels.to(at.device)
    stepper = at.ways[way](model, magnitude_masks(model), OPTIMIZERS[optimizer])
    if at.is_compiled:
        model.compile()

    def step() -> None:
        stepper.zero_grad()
        with torch.autocast(at.device, torch.bfloat16, enabled=at.is_mixed):
            loss = F.cross_entropy(model(inputs).flatten(0, -2), labels)
        loss.backward()
        stepper.step()

    step()
    return Built(step, model, stepper, live_bytes() - before)


def sparsity(model: nn.Module) -> float:
    """Return the sparsity of the weights that a forward pass sees."""
    layers = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
    return sum(int((w == 0).sum()) for w in layers) / sum(w.numel() for w in layers)


def measure(network: str, optimizer: str, num_rounds: int, seed: int, at: At = At()) -> dict[str, Any]:
    num_steps = NETWORKS[network][2] if at.device == "cpu" else 10
    built = {way: build(network, way, optimizer, seed, at) for way in at.ways}
    times: dict[str, list[float]] = {way: [] for way in at.ways}
    for number in range(num_rounds):
        order = list(at.ways) if number % 2 else list(reversed(at.ways))
        for way in order:
            step = built[way].step
            step()  # brings the way's tensors back into the cache
            start = now(at.device)
            for _ in range(num_steps):
                step()
            times[way].append((now(at.device) - start) / num_steps)
    rows = {way: result(way, ready, times[way], times["plain"]) for way, ready in built.items()}
    facts_of_run = {"network": network, "optimizer": optimizer, "rounds": num_rounds}
    return facts_of_run | {"steps_per_turn": num_steps, "ways": rows}


def result(way: str, built: Built, times: list[float], plain: list[float]) -> dict[str, Any]:
    assert way == "plain" or abs(sparsity(built.model) - SPARSITY) < 1e-3, way
    ratios = [ours / theirs for ours, theirs in zip(times, plain, strict=True)]
    row = {"seconds": quartiles(times), "ratio": quartiles(ratios), "live_bytes": built.live_bytes}
    if (masking := getattr(built.optimizer, "masking", None)) and next(built.model.parameters()).is_cpu:
        row |= {
            "masking": quartiles(masking),
            "masking_to_plain": quartiles(masking)[1] / quartiles(plain)[1],
        }
    return row


def run_all(
    name: str,
    text: str | None,
    measure: Measure,
    *,
    optimizers: Sequence[str],
    num_rounds: int,
    prepare: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Measure each network with each optimizer, as the command line says, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["lenet", "mlp", "resnet"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(optimizers))
    parser.add_argument("--rounds", type=int, default=num_rounds)
    parser.add_argument("--seed", type=int, default=0)
    prepare(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = facts(args.seed) | {"sparsity": SPARSITY, "runs": []}
    for network in args.networks:
        for optimizer in args.optimizers:
            run = measure(args, network, optimizer)
            record["runs"].append(run)
            batch = run.get("batch") or NETWORKS[network][1][0]
            print(f"\n{network}, {optimizer}, batch {batch}, {args.rounds} rounds")
            print(table([show(way, row) for way, row in run["ways"].items()]), flush=True)
    print(f"\n{write(name, record).name}")


def show(way: str, row: dict[str, Any]) -> dict[str, str]:
    (_, seconds, _), (low, ratio, high) = row["seconds"], row["ratio"]
    line = {
        "way": way,
        "ms a step": f"{seconds * 1e3:.2f}",
        "ratio to plain": f"{ratio:.3f}",
        "quartiles": f"{low:.3f} – {high:.3f}",
    }
    if "live_bytes" in row:
        line["of it masking itself"] = f"{row['masking_to_plain']:.3f}" if "masking" in row else "–"
        line["live MB"] = f"{row['live_bytes'] / 1e6:.1f}"
    return line


def place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mixed", action="store_true", help="bfloat16 by autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, help="examples; the network's own number by default")


def at_place(args: argparse.Namespace, network: str, optimizer: str) -> dict[str, Any]:
    at = At(args.device, args.mixed, args.compile, args.batch)
    return asdict(at) | measure(network, optimizer, args.rounds, args.seed, at)


if __name__ == "__main__":
    run_all("overhead", __doc__, at_place, optimizers=list(OPTIMIZERS), num_rounds=40, prepare=place)
