"""The epochs of a run that trains several times, and those of them that end before their data do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L


class Course:
    """Where the trainings of a run end: the first takes `length` epochs, each level those from `epoch` on.

    A level that starts within an epoch, behind `num_batches` of it, trains as many batches as were left: its first
    epoch is short, and ends as if `limit_train_batches` had ended it.

    Args:
        num_levels: trainings after the first.
        epoch: the epoch in which levels start, below `length`.
        length: epochs of the first training; 0 while there is none.

    Example:
        >>> course = Course(num_levels=2, epoch=1, length=5)
        >>> [course.end(level) for level in range(3)]
        [5, 9, 13]
    """

    def __init__(self, num_levels: int, epoch: int, length: int = 0) -> None:
        self.num_levels, self.length = num_levels, length
        self.epoch, self.num_batches = epoch, 0
        self.is_short = False
        """Whether the epoch that trains is a short one."""

    def end(self, level: int) -> int:
        """Return how many epochs are done when a level ends; level 0 is the first training."""
        return self.length + level * (self.length - self.epoch)

    def start_at_(self, epoch: int, num_batches: int) -> None:
        """Let levels start in an epoch, after so many of its batches."""
        self.epoch, self.num_batches = epoch, num_batches

    def begin_(self, trainer: L.Trainer) -> None:
        """Let the epoch that trains have the batches that are due, and mark the last of them when it comes."""
        self.cut_(trainer, trainer.current_epoch)
        self.is_short = self._is_short(trainer.current_epoch)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if self.is_short and progress.current.ready == trainer.num_training_batches:
            progress.is_last_batch = True

    def go_on_(self, trainer: L.Trainer) -> None:
        """Let the epoch be short in which the run was that is resumed."""
        if self.is_short:
            _leave_out_(trainer, self.num_batches)

    def cut_(self, trainer: L.Trainer, epoch: int) -> None:
        """Let an epoch have the batches that are due, before it begins."""
        if self.num_batches:
            _leave_out_(trainer, self.num_batches if self._is_short(epoch) else 0)

    def forget_loaders_(self, trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Leave loaders out of a checkpoint once a short epoch is over: in the next they would go on from there."""
        if self.is_short and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def _is_short(self, epoch: int) -> bool:
        return self.num_batches > 0 and epoch in (self.end(level) for level in range(self.num_levels))

    def state_dict(self) -> dict[str, Any]:
        """Return where levels start, and whether the epoch is short."""
        return {"epoch": self.epoch, "num_batches": self.num_batches, "is_short": self.is_short}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where the run was that is resumed."""
        self.start_at_(int(state["epoch"]), int(state["num_batches"]))
        self.is_short = bool(state["is_short"])


def _leave_out_(trainer: L.Trainer, num_batches: int) -> None:
    """Let epochs be so many batches shorter than the data, and be validated at their end all the same."""
    loop = trainer.fit_loop
    assert loop._combined_loader is not None
    whole = len(loop._combined_loader)
    loop.max_batches = whole - num_batches
    if trainer.check_val_every_n_epoch is not None and trainer.val_check_batch is not None:
        interval = trainer.val_check_interval
        every = interval if isinstance(interval, int) else max(1, int(whole * interval))
        trainer.val_check_batch = min(every, loop.max_batches)
