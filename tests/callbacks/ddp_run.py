"""Run by `test_ddp.py`, in two processes: prunes under DDP and writes down what each rank has become."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_prune import (
    APoZ,
    Budget,
    Channel,
    Movement,
    PerRow,
    PostTrainingPruning,
    Random,
    TrainTimePruning,
    Wanda,
    Window,
)
from lightning_prune.examples.loading import ResumableLoader, as_sliced
from lightning_prune.model.history import plans_of
from tests.callbacks.toy import Toy, data, trainer

CASES = {
    "magnitude": {},
    "random": {"criterion": Random(seed=1)},
    "movement": {"criterion": Movement()},
    "wanda": {"criterion": Wanda(), "scope": PerRow(), "report": True},
}
COUPLED = {"granularity": Channel(multiple_of=1), "include": ["body"]}
SMALLER = {
    "end": COUPLED,
    "update": {**COUPLED, "shrink": "update", "criterion": Movement()},
    "activations": {**COUPLED, "shrink": "update", "criterion": APoZ()},
    "never": {**COUPLED, "shrink": "never"},
    # each process measures times of its own
    "latency": {**COUPLED, "sparsity": None, "budget": Budget(latency=0.7, tolerance=0.5)},
}


class Sharded(Toy):
    """Each rank reads its own half of the data: 3 batches of 8, and one of a different size on each epoch's end."""

    def train_dataloader(self):
        pairs = data(num=54).dataset
        sampler = DistributedSampler(
            pairs, self.trainer.world_size, self.trainer.global_rank, shuffle=True, seed=0
        )
        return ResumableLoader(pairs, batch_size=8, sampler=sampler, collate_fn=as_sliced)


def run(case: str, folder: Path, ckpt_path: Path | None = None) -> None:
    options = {"sparsity": 0.7, "window": Window(every=0.1), "report": False, **{**CASES, **SMALLER}[case]}
    callback = TrainTimePruning(**options)
    checkpoint = ModelCheckpoint(folder / case, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(
        callback,
        checkpoint,
        max_epochs=2,
        strategy="ddp",
        devices=2,
        use_distributed_sampler=False,
        default_root_dir=folder / case,
    )
    module = Sharded()
    torch.manual_seed(fit.global_rank)  # dropout differs between the ranks
    fit.fit(module, val_dataloaders=data(), ckpt_path=ckpt_path)
    save(fit, module, callback, folder / f"{case}-{'resumed' if ckpt_path else 'whole'}")


def save(fit, module, callback, path: Path) -> None:
    state = {"weights": module.state_dict(), "masks": callback.masks, "updates": callback.updates}
    state["slices"] = [{n: dict(d) for n, d in plan.slices.items()} for plan in plans_of(module)]
    state["moments"] = [s["exp_avg"] for o in fit.optimizers for s in o.state.values()]
    torch.save(state, f"{path}-{fit.global_rank}.pt")


def run_once(folder: Path) -> None:
    """Train, then prune once at the end."""
    callback = PostTrainingPruning(0.5, granularity=Channel(multiple_of=1), report=False)
    settings = {"max_epochs": 1, "strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    fit = trainer(callback, ModelCheckpoint(folder / "once"), default_root_dir=folder / "once", **settings)
    module = Sharded()
    fit.fit(module, val_dataloaders=data())
    save(fit, module, callback, folder / "once-whole")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for case in {**CASES, **SMALLER}:
        run(case, folder)
    run("movement", folder, folder / "movement" / "step=5.ckpt")
    run("update", folder, folder / "update" / "step=3.ckpt")
    run_once(folder)
