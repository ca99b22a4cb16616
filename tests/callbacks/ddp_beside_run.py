"""Run by `test_ddp_beside.py`, in two processes: pruning with what else a run may have, under DDP."""

import copy
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_prune import (
    ERK,
    Channel,
    Constant,
    Distillation,
    GroupLasso,
    Linear,
    Movement,
    Saliency,
    SparseTraining,
    StraightThrough,
    TopKAST,
    TrainTimePruning,
    Window,
)
from lightning_prune.callbacks.structure import averaged_models
from lightning_prune.model.history import plans_of
from tests.callbacks.ddp_run import First, Sharded, save
from tests.callbacks.sharded_run import Net
from tests.callbacks.toy import data, trainer

DECAY = 0.8
MIDDLE, LATER = 6, 8
"""Steps of twelve, after which runs are resumed."""
COUPLED = {"granularity": Channel(multiple_of=1), "include": ["body"]}
UPDATE = {**COUPLED, "shrink": "update", "criterion": Movement()}
EMA = lambda: [EMAWeightAveraging(decay=DECAY)]  # noqa: E731
SWA = lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=2)]  # noqa: E731
AVERAGED = {
    "ema-end": {**COUPLED, "beside": EMA},
    "ema-update": {**UPDATE, "beside": EMA},
    "swa-end": {**COUPLED, "beside": SWA},
    "swa-update": {**UPDATE, "beside": SWA},
}
CASES = {
    "distilled": {"beside": lambda: [Distillation(0.7)]},
    "distilled-update": {**UPDATE, "beside": lambda: [Distillation(0.7)]},
    "top-kast": {"masking": TopKAST(), "schedule": Constant(), "scope": ERK()},
    "group-lasso": {**COUPLED, "regularizer": GroupLasso(1e-2)},
    "update": {**UPDATE, "schedule": Linear(), "window": Window(end=0.8, every=0.1)},
    "rigl-2": {"callback": SparseTraining, "accumulate": 2},
    "saliency-2": {"criterion": Saliency(), "accumulate": 2},
    "ste-2": {"masking": StraightThrough(), "accumulate": 2},
    "update-2": {**UPDATE, "accumulate": 2},
    **AVERAGED,
}
ACCUMULATED = {
    "rigl": {"callback": SparseTraining},
    "saliency": {"criterion": Saliency()},
    "movement": {"criterion": Movement()},
}
"""Cases on batches of which one process can have the whole."""


class AveragedByOne(Sharded):
    """An average within the module that the first process alone keeps, as many do."""

    def __init__(self):
        super().__init__()
        self.ema = copy.deepcopy(self.body).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for average, own in zip(self.ema.parameters(), self.body.parameters(), strict=True):
            average.lerp_(own, 0.1) if self.trainer.is_global_zero else None


class Start(First):
    """Keeps what else a run starts from."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        if not hasattr(self, "found"):
            weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            moments = [state["exp_avg"].clone() for o in trainer.optimizers for state in o.state.values()]
            self.found = {"weights": weights, "moments": moments, "masks": dict(self.callback.masks)}


class Snapshots(L.Callback):
    """Keeps the weights of each step, or of each epoch's start, cut as the plans of the model say."""

    def __init__(self, hook):
        self.weights, self.num_plans = [], 0
        setattr(self, hook, self.look)
        self.on_train_end = self.follow

    def follow(self, trainer, pl_module):
        plans = plans_of(pl_module)
        for plan, weights in product(plans[self.num_plans :], self.weights):
            for name, dims in plan.slices.items():
                for dim, kept in dims.items() if name in weights else ():
                    weights[name] = weights[name].index_select(dim, torch.tensor(kept))
        self.num_plans = len(plans)

    def look(self, trainer, pl_module, *_):
        self.follow(trainer, pl_module)
        self.weights.append({n: weight.detach().clone() for n, weight in pl_module.named_parameters()})


def run(case: str, folder: Path, ckpt_path: Path | None = None) -> None:
    options = {"sparsity": 0.7, "report": False, "window": Window(every=0.1), **CASES[case]}
    beside, accumulate = options.pop("beside", list)(), options.pop("accumulate", 1)
    callback = options.pop("callback", TrainTimePruning)(**options)
    checkpoint = ModelCheckpoint(folder / case, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    snapshots = Snapshots("on_train_batch_end" if case.startswith("ema") else "on_train_epoch_start")
    fit = trainer(
        *beside,
        snapshots,
        callback,
        checkpoint,
        start := Start(callback),
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder / case,
        **several(),
    )
    module = Sharded()
    torch.manual_seed(fit.global_rank)
    fit.fit(module, val_dataloaders=data(), ckpt_path=ckpt_path)
    path = folder / f"{case}-{'resumed' if ckpt_path else 'whole'}"
    save(fit, module, callback, path, start.masks)
    more = {"loss": fit.callback_metrics["train/loss"], "snapshots": snapshots.weights, "start": start.found}
    more["averages"] = [dict(model.named_parameters()) for model in averaged_models(fit)]
    torch.save(more, f"{path}-more-{fit.global_rank}.pt")


def several() -> dict[str, Any]:
    """Settings of a trainer for as many processes as there are."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = "ddp" if world > 1 else "auto"
    return {"strategy": strategy, "devices": world, "use_distributed_sampler": False}


def run_accumulated(case: str, folder: Path) -> None:
    """Train on two batches a step; what one process has as a whole, two have by halves."""
    options = {"sparsity": 0.6, "report": False, "window": Window(every=0.2), **ACCUMULATED[case]}
    callback = options.pop("callback", TrainTimePruning)(**options)
    fit = trainer(
        callback, max_epochs=4, accumulate_grad_batches=2, default_root_dir=folder / case, **several()
    )
    module = Net("one")
    fit.fit(module)
    save(fit, module, callback, folder / f"{case}-{'halves' if fit.world_size > 1 else 'wholes'}")


def run_averaged_by_one(folder: Path) -> None:
    callback = TrainTimePruning(0.7, report=False, window=Window(every=0.1), **COUPLED, shrink="update")
    fit = trainer(callback, max_epochs=3, default_root_dir=folder / "by_one", **several())
    fit.fit(module := AveragedByOne())
    torch.save([plan.slices for plan in plans_of(module)], folder / f"by-one-{fit.global_rank}.pt")


def run_two(folder: Path) -> None:
    run_averaged_by_one(folder)
    for case in CASES:
        run(case, folder)
        run(case, folder, folder / case / f"step={MIDDLE // CASES[case].get('accumulate', 1)}.ckpt")
    for case in ACCUMULATED:
        run_accumulated(case, folder)


def run_again(folder: Path) -> None:
    """Go on where one process has gone on that had gone on from two."""
    run("update", folder / "again", folder / "to_one" / "update" / f"step={LATER}.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"two": run_two, "again": run_again}[sys.argv[2]](Path(sys.argv[1]))
