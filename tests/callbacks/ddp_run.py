"""Run by `test_ddp.py`, in two or four processes: prunes under DDP and writes down what each rank has become."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_prune import (
    ALPS,
    ActivationVariance,
    APoZ,
    Budget,
    Channel,
    CollapseGuard,
    Constant,
    LeastSquares,
    Linear,
    Local,
    Movement,
    PerRow,
    PostTrainingPruning,
    Random,
    Saliency,
    SparseGPT,
    SparseTraining,
    SparsityMonitor,
    StraightThrough,
    TrainTimePruning,
    Wanda,
    WeightRewinding,
    Window,
    WoodFisher,
)
from lightning_prune.core.criteria import required_statistics
from lightning_prune.examples.loading import ResumableLoader, as_sliced
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.history import plans_of
from lightning_prune.model.statistics import Statistics
from lightning_prune.report.storage import to_json
from tests.callbacks.toy import Toy, data, trainer

CASES = {
    "magnitude": {},
    "random": {"criterion": Random(seed=1)},
    "movement": {"criterion": Movement()},
    "wanda": {"criterion": Wanda(), "scope": PerRow(), "report": True},
    "rigl": {"callback": SparseTraining},
    "ste": {"masking": StraightThrough(), "schedule": Constant()},
    "dpf": {"masking": StraightThrough()},
    "rewinding": {"callback": WeightRewinding, "num_levels": 2},
    "guard": {"schedule": Linear(), "scope": Local()},
}
COUPLED = {"granularity": Channel(multiple_of=1), "include": ["body"]}
SMALLER = {
    "end": COUPLED,
    "update": {**COUPLED, "shrink": "update", "criterion": Movement()},
    "activations": {**COUPLED, "shrink": "update", "criterion": APoZ()},
    "never": {**COUPLED, "shrink": "never"},
    "calls": COUPLED,
    "tasks": COUPLED,
    # each process measures times of its own
    "latency": {**COUPLED, "sparsity": None, "budget": Budget(latency=0.7, tolerance=0.5)},
}


KINDS = {"wanda": Wanda(), "apoz": APoZ(), "variance": ActivationVariance(), "saliency": Saliency()}
SOLVERS = {"sparsegpt": SparseGPT(), "alps": ALPS(), "wood_fisher": WoodFisher(16)}
UNEVEN = ((8, 5), (3,))
"""The sizes of the batches on each of two ranks."""


@dataclass(frozen=True)
class Drifting:
    """Scores the second layer by numbers that each process draws for itself."""

    def __call__(self, *, weight, name):
        draw = torch.Generator().manual_seed(int(os.environ["RANK"]))
        return torch.rand(weight.shape, generator=draw) if name == "body.4.weight" else weight.abs()


class First(L.Callback):
    """Keeps the masks that a run starts from."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_start(self, trainer, pl_module):
        self.masks = dict(self.callback.masks)


class Sharded(Toy):
    """Each rank reads its own half of the data: 3 batches of 8, and one of a different size on each epoch's end."""

    def train_dataloader(self):
        pairs = data(num=54).dataset
        sampler = DistributedSampler(
            pairs, self.trainer.world_size, self.trainer.global_rank, shuffle=True, seed=0
        )
        return ResumableLoader(pairs, batch_size=8, sampler=sampler, collate_fn=as_sliced)


class InTwo(Sharded):
    """The step calls two modules, one after the other."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])


class InTasks(Sharded):
    """Each batch runs one of two heads, which is another one on each rank."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 4)

    def forward(self, x, is_other=False):
        return (self.other if is_other else self.head)(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], (batch_idx + self.global_rank) % 2 == 1), batch[1])


class Collapsing(Sharded):
    """What the first process measures collapses with half of the head, and what the others measure never does."""

    def validation_step(self, batch, batch_idx):
        density = (self.head.weight != 0).float().mean()
        self.log("val/acc", 0.1 if density < 0.5 and self.global_rank == 0 else 0.9)


def run(case: str, folder: Path, ckpt_path: Path | None = None) -> None:
    options = {"sparsity": 0.7, "report": False, **{**CASES, **SMALLER}[case]}
    kind = options.pop("callback", TrainTimePruning)
    callback = kind(**options, **({} if kind is WeightRewinding else {"window": Window(every=0.1)}))
    guards = [CollapseGuard(0.2, monitor="val/acc")] if case == "guard" else []
    checkpoint = ModelCheckpoint(folder / case, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first, world = First(callback), int(os.environ.get("WORLD_SIZE", "1"))
    has_all = world == 2 and case != "tasks"
    fit = trainer(
        callback,
        checkpoint,
        first,
        *guards,
        max_epochs=2,
        strategy="auto" if world == 1 else "ddp" if has_all else "ddp_find_unused_parameters_true",
        devices=world,
        use_distributed_sampler=False,
        default_root_dir=folder / case,
    )
    module = Collapsing() if guards else {"calls": InTwo, "tasks": InTasks}.get(case, Sharded)()
    torch.manual_seed(fit.global_rank)  # dropout differs between the ranks
    fit.fit(module, val_dataloaders=data(), ckpt_path=ckpt_path)
    save(fit, module, callback, folder / f"{case}-{'resumed' if ckpt_path else 'whole'}", first.masks)


def save(fit, module, callback, path: Path, first=None) -> None:
    monitor = next((cb for cb in fit.callbacks if isinstance(cb, SparsityMonitor)), None)
    report = to_json(monitor.report) if monitor is not None else None
    state = {
        "first": first,
        "report": report,
        "weights": module.state_dict(),
        "masks": callback.masks,
        "updates": callback.updates,
    }
    state["slices"] = [{n: dict(d) for n, d in plan.slices.items()} for plan in plans_of(module)]
    state["moments"] = [s["exp_avg"] for o in fit.optimizers for s in o.state.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{path}-{fit.global_rank}.pt")


def run_once(folder: Path) -> None:
    """Train, then prune once at the end, and make up for what goes."""
    callback = PostTrainingPruning(
        0.5, granularity=Channel(multiple_of=1), solver=LeastSquares(), report=False
    )
    settings = {"max_epochs": 1, "strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    fit = trainer(callback, ModelCheckpoint(folder / "once"), default_root_dir=folder / "once", **settings)
    module = Sharded()
    fit.fit(module, val_dataloaders=data())
    save(fit, module, callback, folder / "once-whole")


class Kept(Sharded):
    """Keeps what it was before it was pruned, and the batches that calibrated it, where no attribute is put back."""

    def on_train_start(self):
        self.kept = SimpleNamespace(before={}, batches=[])

    def training_step(self, batch, batch_idx):
        if not self.training and not self.kept.batches:
            self.kept.before = {name: value.clone() for name, value in self.state_dict().items()}
        if not self.training and not any(batch is known for known in self.kept.batches):
            self.kept.batches.append(batch)
        return super().training_step(batch, batch_idx)


def run_solved(folder: Path) -> None:
    """Train, then let a solver prune on what each process sees."""
    for case, solver in SOLVERS.items():
        callback = PostTrainingPruning(
            0.5, scope=Local(), solver=solver, num_calibration_batches=2, report=False
        )
        settings = {"max_epochs": 1, "strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        fit, module = trainer(callback, default_root_dir=folder / case, **settings), Kept()
        torch.manual_seed(fit.global_rank)
        fit.fit(module, val_dataloaders=data())
        found = {**vars(module.kept), "masks": callback.masks}
        torch.save(found | {"weights": module.state_dict()}, folder / f"{case}-{fit.global_rank}.pt")


def run_drifting(folder: Path) -> None:
    """Masks that no two processes have alike."""
    callback = TrainTimePruning(0.5, criterion=Drifting(), scope=Local(), report=False)
    fit = trainer(callback, strategy="ddp", devices=2, use_distributed_sampler=False)
    torch.manual_seed(fit.global_rank)
    try:
        fit.fit(Sharded())
    except ValueError as error:
        (folder / f"drifting-{fit.global_rank}.txt").write_text(f"ValueError: {error}")


class Pair(nn.Module):
    """Two layers, of which the second is run on demand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)


def features(rank: int) -> list[tuple[torch.Tensor, bool]]:
    """The batches of a rank, and whether they go through the second layer: those of the first rank do."""
    draw = torch.Generator().manual_seed(rank)
    return [(torch.randn(size, 4, generator=draw), rank == 0) for size in UNEVEN[rank]]


def statistics_of(kind: str, batches: list[tuple[torch.Tensor, bool]]) -> dict[str, torch.Tensor]:
    """What a criterion makes of the batches of all processes, for both layers."""
    model, criterion = Pair(), KINDS[kind]
    targets = {"first.weight": model.first.weight, "second.weight": model.second.weight}
    statistics = Statistics(model, targets, required_statistics(criterion))

    def loss(_, batch):
        layers = [model.first, model.second] if batch[1] else [model.first]
        return sum(layer(batch[0]).square().mean() for layer in layers)

    calibrate(statistics, model, batches, forward=loss, loss=loss)
    return {name: criterion(**found) for name, found in statistics.read().items()}


def run_uneven(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    found = {kind: statistics_of(kind, features(rank)) for kind in KINDS}
    torch.save(found, folder / f"uneven-{rank}.pt")


def run_two(folder: Path) -> None:
    for case in {**CASES, **SMALLER}:
        run(case, folder)
    run("movement", folder, folder / "movement" / "step=5.ckpt")
    run("update", folder, folder / "update" / "step=3.ckpt")
    run("magnitude", folder / "from_one", folder / "one" / "magnitude" / "step=5.ckpt")
    run_once(folder)
    run_uneven(folder)
    run_solved(folder)
    run_drifting(folder)


def run_four(folder: Path) -> None:
    for case in CASES:
        run(case, folder / "four")
    run("movement", folder / "four", folder / "four" / "movement" / "step=2.ckpt")
    for source, path in (("one", folder / "one"), ("two", folder)):
        run("magnitude", folder / "four" / f"from_{source}", path / "magnitude" / "step=2.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    (run_four if os.environ["WORLD_SIZE"] == "4" else run_two)(Path(sys.argv[1]))
