"""Files of torch that are whole: what was changed or cut off on the way is refused, and not read as other weights."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return what a checkpoint holds: tensors and plain data, of which nothing is run.

    Raises:
        ValueError: it was cut off or changed, holds more than tensors and plain data, or no weights of a model.
        FileNotFoundError: it is not there.
    """
    check_whole(path)
    found = safely(lambda: torch.load(path, map_location=map_location, weights_only=True), path)
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise ValueError(f"`path` is a checkpoint with a `state_dict`, but got {path}, which holds none.")
    return found


def safely(load: Callable[[], T], path: str | Path) -> T:
    """Load a file, and say what is meant where torch refuses to run what is in it.

    Raises:
        ValueError: it holds more than tensors and plain data.
    """
    try:
        return load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`path` holds tensors and plain data, but got {path} with more than that, which could run code when it is "
            f"read: {str(error).splitlines()[-1].strip() or type(error).__name__}"
        ) from error


def check_whole(path: str | Path) -> None:
    """Refuse a file that `torch.save` has written and that is not what it was.

    Archives hold a checksum (CRC-32) of each tensor, which `torch.load` does not look at: of a file with a flipped bit
    it mostly returns other weights. It takes about a second for each gigabyte. Paths with a protocol ("s3://...") are
    left alone.

    Raises:
        ValueError: the file is cut off, was changed, or is no archive of torch; or it is a folder of shards.
        FileNotFoundError: it is not there.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "weights.pt"
        >>> torch.save({"w": torch.zeros(100)}, path)
        >>> check_whole(path)
        >>> damaged = bytearray(path.read_bytes())
        >>> damaged[len(damaged) // 2] ^= 1
        >>> _ = path.write_bytes(damaged)
        >>> check_whole(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: `path` is a file as torch has written it, but got ...weights.pt, which is damaged: ...
    """
    if "://" in str(path):
        return
    if Path(path).is_dir():
        raise ValueError(
            f"`path` is a file as torch has written it, but got the folder {path}. If a strategy has saved its shards "
            "there, a Trainer with that strategy goes on from them, on one device as well as on many "
            "(`ModelParallelStrategy(1, 1)`); what `ModelParallelStrategy(save_distributed_checkpoint=False)` saves "
            "is one file, for `load_pruned` too."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        reason = f"{damaged} has another checksum" if damaged else None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, KeyError) as error:
        reason = str(error) or type(error).__name__
    if reason:
        raise ValueError(
            f"`path` is a file as torch has written it, but got {path}, which is damaged: {reason}. It was cut off or "
            "changed, or is none."
        )
