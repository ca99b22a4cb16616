"""Run by `test_initial_ddp.py`, in two processes: prunes before training and writes down what each rank has become."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_prune import (
    OBD,
    ActivationVariance,
    BatchNormScale,
    Channel,
    Fisher,
    GraSP,
    InitialPruning,
    Saliency,
    Slice,
    SynFlow,
)
from tests.callbacks.ddp_run import Sharded
from tests.callbacks.toy import data, trainer

CASES = {
    "snip": {"criterion": Saliency()},
    "fisher": {"criterion": Fisher(), "num_calibration_batches": 2},
    "grasp": {"criterion": GraSP(), "num_calibration_batches": 2},
    "obd": {"criterion": OBD(), "num_calibration_batches": 2},
    "synflow": {"criterion": SynFlow(), "num_rounds": 5},
    "variance": {"criterion": ActivationVariance(), "granularity": Slice(dim=0)},
    "force": {"criterion": Saliency(), "num_rounds": 3, "revive": True},
    "slimming": {"criterion": BatchNormScale(), "granularity": Slice(dim=0), "include": ["body.0"]},
    "channels": {"criterion": GraSP(), "granularity": Channel(multiple_of=1), "sparsity": 0.5},
}


class Recorder(Sharded):
    """Keeps the batches that the first steps were given."""

    def on_fit_start(self):
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step > 0 or self.trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            self.seen.append(batch)
        return super().training_step(batch, batch_idx)


def run(case: str, folder: Path) -> None:
    callback = InitialPruning(
        **{"sparsity": 0.7, "num_calibration_batches": 1, "report": False, **CASES[case]}
    )
    options = {"max_epochs": 1, "strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    fit = trainer(callback, **options, default_root_dir=folder)
    module = Recorder()
    torch.manual_seed(fit.global_rank)  # dropout differs between the ranks
    fit.fit(module, val_dataloaders=data())
    num_batches = callback.num_calibration_batches
    state = {
        "weights": module.state_dict(),
        "masks": callback.masks,
        "updates": callback.updates,
        "batches": module.seen[:num_batches],
    }
    torch.save(state, folder / f"{case}-{fit.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        run(case, Path(sys.argv[1]))
