"""Checkpoints that are on disk whole or not at all."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_prune.model.whole import check_whole, safely


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside their place, on the same disk, and move them there when all of it is safe.

    Pruning callbacks put it in the place of Lightning's own plugin; without them it is
    `Trainer(plugins=[AtomicCheckpointIO()])`. Lightning's own goes by way of the system's temporary folder: where that
    is another disk, the move is a copy, and a run that is killed within it, or a disk that is full, takes the last good
    checkpoint of that name along. What a killed run has left beside a file goes when it is written again. A checkpoint
    that is read is checked first: torch takes one with a flipped bit for good. Paths with a protocol ("s3://...") are
    left to Lightning.

    Cost: about a second for each gigabyte that is read; when one is written, it is not held in memory a second time.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/last.ckpt"
        >>> AtomicCheckpointIO().save_checkpoint({"epoch": 3}, path)
        >>> torch.load(path, weights_only=True)
        {'epoch': 3}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: the disk is full, or the folder cannot be written; what was at `path` is still there.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        for left_behind in place.parent.glob(f".{place.name}.*.tmp"):
            left_behind.unlink(missing_ok=True)
        beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                _save(checkpoint, file, place)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint that is whole.

        Raises:
            ValueError: it was cut off or changed, or with `weights_only` holds more than tensors and plain data.
            FileNotFoundError: it is not there.
        """
        check_whole(path)
        read = partial(super().load_checkpoint, path, map_location, weights_only)
        return safely(read, path)


def keep_files_whole_(trainer: L.Trainer) -> None:
    """Let a Trainer write and read checkpoints by `AtomicCheckpointIO`, unless it was given a plugin for that."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


class _Witness:
    """Remembers why a file could not be written, which torch does not tell."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, OSError()

    def flush(self) -> None:
        self.file.flush()

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def _save(checkpoint: dict[str, Any], file: BinaryIO, place: Path) -> None:
    witness = _Witness(file)
    try:
        torch.save(checkpoint, witness)  # type: ignore[arg-type]
    except (RuntimeError, OSError):
        if witness.error.errno is None:
            raise
        raise OSError(witness.error.errno, witness.error.strerror, str(place)) from None
