"""Run by `test_sharded.py`, in two or four processes: the same training under DDP and with sharded weights."""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_prune import (
    ERK,
    LAMP,
    OWL,
    APoZ,
    Block,
    ConstantFanIn,
    GeometricMedian,
    Global,
    Local,
    MeanGradient,
    Movement,
    NofM,
    PerRow,
    Random,
    Saliency,
    Slice,
    SparseTraining,
    StraightThrough,
    TrainTimePruning,
    Wanda,
    Window,
)
from lightning_prune.callbacks.monitor import SparsityMonitor
from lightning_prune.examples.loading import ResumableLoader, as_sliced
from lightning_prune.model.shards import Rows
from tests.callbacks.toy import data, trainer

BY_ROWS = {
    "defaults": {"report": True},
    "floors": {"scope": Global(min_keep=0.35)},
    "local": {"criterion": Movement(), "scope": Local()},
    "erk": {"criterion": Saliency(), "scope": ERK()},
    "wanda": {"criterion": Wanda(), "scope": PerRow()},
    "n-of-m": {"sparsity": None, "scope": NofM(), "exclude": ["net.2"]},
    "rows": {"criterion": APoZ(), "granularity": Slice(dim=0), "exclude": ["net.4"]},
}
PUT_TOGETHER = {
    "lamp": {"scope": LAMP()},
    "random": {"criterion": Random(seed=3)},
    "columns": {"granularity": Slice(dim=1)},
    "blocks": {"granularity": Block(2, 2)},
    "owl": {"scope": OWL()},
    "median": {
        "criterion": GeometricMedian(),
        "granularity": Slice(dim=0),
        "scope": Local(),
        "exclude": ["net.4"],
    },
}
OTHERS = {
    "ste": {"masking": StraightThrough()},
    "rigl": {"callback": SparseTraining},
    "rigl-mean": {"callback": SparseTraining, "grow": MeanGradient()},
}
EARLY = {"early": BY_ROWS["wanda"]}
CASES = {**BY_ROWS, **PUT_TOGETHER, **OTHERS}
CUT = {
    "n-of-m-cut": {"sparsity": None, "scope": NofM()},
    "per-row": {"scope": PerRow()},
    "fan-in": {"scope": ConstantFanIn(), "callback": SparseTraining, "exclude": ["net.4"]},
    "rows-cut": {"granularity": Slice(dim=0), "exclude": ["net.4"]},
    "columns-cut": {"granularity": Slice(dim=1), "scope": Local()},
    "blocks-cut": {"granularity": Block(1, 4)},
}
"""Cases whose groups, blocks and rows tensor parallelism cuts: 12 inputs of which each of two processes has 6."""


EVEN = ("even", "tensor", "both")
"""Kinds of runs whose rows are shared out evenly, which tensor parallelism asks for."""


class Net(L.LightningModule):
    """Layers whose rows cannot be shared out evenly, the last one with fewer rows than four processes."""

    def __init__(self, kind: str = "sharded") -> None:
        super().__init__()
        torch.manual_seed(0)
        width = 12 if kind in EVEN else 13
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        self.kind, self.tensor_parallel = kind, kind in ("tensor", "both")

    def configure_model(self):
        if self.device_mesh is None or self.tensor_parallel is None:
            return
        if self.tensor_parallel:
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.kind == "hybrid":  # shards within each half of the processes, and copies of them in the other
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=mesh)
        elif self.kind != "tensor":
            from torch.distributed.fsdp import fully_shard

            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        self.tensor_parallel = None

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1] % 3)

    def train_dataloader(self):
        pairs, mesh = data(num=48).dataset, self.device_mesh
        where = (self.trainer.world_size, self.trainer.global_rank)
        if mesh is not None:
            where = mesh["data_parallel"].size(), mesh["data_parallel"].get_local_rank()
        sampler = DistributedSampler(pairs, *where, shuffle=True, seed=0)
        return ResumableLoader(pairs, batch_size=12 // where[0], sampler=sampler, collate_fn=as_sliced)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-2, weight_decay=0.1)


def strategy_of(kind: str, world: int):
    if kind in ("ddp", "one", "even"):
        return "ddp" if world > 1 else "auto"
    sizes = {"tensor": (1, world), "both": (2, world // 2)}.get(kind, (world, 1))
    return ModelParallelStrategy(*sizes, save_distributed_checkpoint=kind != "full")


class Watch(L.Callback):
    """Reads pruned weights at each step, and the masks that training starts from."""

    def __init__(self, callback, is_early: bool) -> None:
        self.callback, self.is_early, self.num_leaks, self.first = callback, is_early, 0, None

    def on_train_epoch_start(self, trainer, pl_module):
        """Save before the first step: torch takes a step of its own then, to have something to save."""
        if trainer.global_step == 0 and self.is_early:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/first.ckpt")

    def on_train_batch_start(self, trainer, pl_module, *_):
        if self.first is None:
            self.first = whole(self.callback.masks)
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.callback.masks.items():
            own, kept = parameters[name].detach(), mask
            if hasattr(own, "to_local"):
                own, kept = own.to_local(), mask.to_local()
            self.num_leaks += int(own[~kept].count_nonzero())


def whole(tensors) -> dict[str, torch.Tensor]:
    return {
        n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()
    }


def run(case: str, kind: str, folder: Path, ckpt_path: Path | None = None) -> None:
    settings = {
        "sparsity": 0.6,
        "window": Window(every=0.2),
        "report": False,
        **{**CASES, **EARLY, **CUT}[case],
    }
    callback = settings.pop("callback", TrainTimePruning)(**settings)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    name = f"{case}-{kind}" + ("-resumed" if ckpt_path else "")
    watch = Watch(callback, is_early=case == "early")
    checkpoint = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [callback, watch, *([checkpoint] if case == "local" else [])]
    fit = trainer(
        *callbacks,
        max_epochs=2,
        strategy=strategy_of(kind, world),
        devices=world,
        use_distributed_sampler=False,
        default_root_dir=folder / name,
    )
    module = Net(kind)
    fit.fit(module, ckpt_path=ckpt_path)
    moments = {
        n: value for n, p in module.named_parameters() for value in [fit.optimizers[0].state[p]["exp_avg"]]
    }
    monitor = next((cb for cb in fit.callbacks if isinstance(cb, SparsityMonitor)), None)
    state = {
        "weights": whole(dict(module.named_parameters())),
        "moments": whole(moments),
        "masks": whole(callback.masks),
        "updates": callback.updates,
        "leaks": watch.num_leaks,
        "first": watch.first,
        "by_rows": isinstance(callback.pruner.shards, Rows),
        "nonzeros": [layer.nonzeros for layer in monitor.report.layers] if monitor else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"{name}-{fit.global_rank}.pt")


def run_two(folder: Path) -> None:
    for case in CASES:
        run(case, "ddp", folder)
        run(case, "sharded", folder)
    run("early", "sharded", folder)
    for kind in ("full", "tensor"):
        run("local", kind, folder)
    for case in CUT:
        run(case, "tensor", folder)
    run("local", "sharded", folder, folder / "local-sharded" / "step=5.ckpt")
    run("local", "full", folder, folder / "local-full" / "step=5.ckpt")


def run_four(folder: Path) -> None:
    out = folder / "four"
    for case in CASES:
        run(case, "ddp", out)
        run(case, "sharded", out)
    run("local", "both", out)
    run("local", "hybrid", out)
    run("lamp", "hybrid", out)
    run("local", "full", out)
    run("local", "sharded", out, folder / "local-sharded" / "step=5.ckpt")
    run("local", "full", out, folder / "local-full" / "step=5.ckpt")


def run_two_again(folder: Path) -> None:
    """Go on in two processes from what four have written."""
    for kind in ("sharded", "full"):
        run("local", kind, folder / "two", folder / "four" / f"local-{kind}" / "step=5.ckpt")


def run_one(folder: Path) -> None:
    """Go on in one process from what two have written in shards."""
    run("local", "sharded", folder / "alone", folder / "local-sharded" / "step=5.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = {"1": run_one, "2": run_two_again if "again" in sys.argv else run_two, "4": run_four}
    steps[os.environ["WORLD_SIZE"]](Path(sys.argv[1]))
