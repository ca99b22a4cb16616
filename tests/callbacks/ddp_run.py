"""Run by `test_ddp.py`, in two processes: prunes under DDP and writes down what each rank has become."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_prune import Movement, PerRow, Random, TrainTimePruning, Wanda, Window
from lightning_prune.examples.loading import ResumableLoader, as_sliced
from tests.callbacks.toy import Toy, data, trainer

CASES = {
    "magnitude": {},
    "random": {"criterion": Random(seed=1)},
    "movement": {"criterion": Movement()},
    "wanda": {"criterion": Wanda(), "scope": PerRow(), "report": True},
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
    callback = TrainTimePruning(0.7, **{"window": Window(every=0.1), "report": False, **CASES[case]})
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
    state = {"weights": module.state_dict(), "masks": callback.masks, "updates": callback.updates}
    torch.save(state, folder / f"{case}-{'resumed' if ckpt_path else 'whole'}-{fit.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for case in CASES:
        run(case, folder)
    run("movement", folder, folder / "movement" / "step=5.ckpt")
