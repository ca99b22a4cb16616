"""What a pruning leaves behind when it is interrupted, beside the checkpoints, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_prune.model.shrinking import AnyPruner
from lightning_prune.model.unfinished import Unfinished, key_of

FOLDER, LATENCIES = "unfinished", "latencies.json"


def folder_of(trainer: L.Trainer) -> Path:
    """Return the folder of the checkpoints, where there is one."""
    callback = trainer.checkpoint_callback
    folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    return Path(folder or trainer.default_root_dir)


def local_folder_of(trainer: L.Trainer) -> Path | None:
    """Return the same for notes of one process on its own disk; None elsewhere."""
    folder = folder_of(trainer)
    return None if trainer.world_size > 1 or ":/" in str(folder) else folder


@contextmanager
def going_on(
    trainer: L.Trainer,
    pruner: AnyPruner,
    words: Mapping[str, str],
    batches: Iterable[Any],
    wanted: str | Path | None,
) -> Iterator[Unfinished | None]:
    """Let what is done inside outlive an interrupt, and say where it lies; it is removed in the end.

    Args:
        trainer: says where.
        pruner: of the model as it is before.
        words: what else makes a difference.
        batches: calibration data.
        wanted: a folder to go on from.

    Yields:
        The folder; None where there are several processes, which could go on from different places.

    Raises:
        ValueError: what is wanted is not there, or is of another pruning.
    """
    folder = local_folder_of(trainer)
    if folder is None and wanted is None:
        yield None
        return
    key = key_of(pruner.model, pruner.masks, words, batches)
    place = wanted if wanted is not None else folder / FOLDER  # type: ignore[operator]
    unfinished = Unfinished(place, key, is_wanted=wanted is not None)
    try:
        yield unfinished
    except (KeyboardInterrupt, SystemExit):
        unfinished.flush()
        if unfinished.is_begun:
            where = unfinished.folder
            rank_zero_info(f"What is done of the pruning lies in {where}; go on with unfinished={where}.")
        raise
    unfinished.finish()
