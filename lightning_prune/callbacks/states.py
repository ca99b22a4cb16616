"""States that callbacks find in a checkpoint, which somebody may have changed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_prune.core.patterns import listed
from lightning_prune.model.shards import local

SEAL = "checksum"


@contextmanager
def restoring(callback: L.Callback) -> Iterator[None]:
    """Say whose state is at fault where a checkpoint lacks some of it, or holds something else in its place.

    Args:
        callback: which reads its state inside.

    Raises:
        ValueError: it found no value, or one of another kind.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"holds something else: {error}"
        raise ValueError(
            f"`ckpt_path` holds a state of {type(callback).__name__} as it was saved, but this one {what}. Resume from "
            "another checkpoint."
        ) from error


def seal_(callback: L.Callback, checkpoint: Mapping[str, Any]) -> None:
    """Put a checksum of each entry into the state of a callback that a checkpoint holds, if there is one."""
    if state := checkpoint.get("callbacks", {}).get(callback.state_key):
        state[SEAL] = {name: checksum(value) for name, value in state.items() if name != SEAL}


def check_seal(callback: L.Callback, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a state that is not as it was saved: masks that are missing would let weights grow back unnoticed.

    Raises:
        ValueError: an entry has another checksum, or is gone. Entries without one, which others have added, and states
            without any, as other versions wrote them, are let through.
    """
    state = checkpoint.get("callbacks", {}).get(callback.state_key)
    if not isinstance(state, Mapping) or SEAL not in state:
        return
    sums = state[SEAL] if isinstance(state[SEAL], Mapping) else {SEAL: 0}
    if wrong := [name for name, found in sums.items() if name not in state or checksum(state[name]) != found]:
        raise ValueError(
            f"`ckpt_path` holds a state of {type(callback).__name__} as it was saved, but got one that was changed "
            f"since: {listed(wrong)} has another checksum. Resume from another checkpoint."
        )


def checksum(value: object, start: int = 0) -> int:
    """Return the CRC-32 of plain data and tensors, wherever these lie; lists are as good as tuples.

    Args:
        value: mappings, sequences, sets, tensors, numbers and text; of others their class counts.
        start: the sum of what comes before.

    Example:
        >>> import torch
        >>> checksum({"a": [1, torch.ones(2)], "b": None}) == checksum({"b": None, "a": (1, torch.ones(2))})
        True
        >>> checksum([1, 2]) == checksum([1, [2]])
        False
    """
    if isinstance(value, Tensor):
        tensor = local(value.detach()).cpu().contiguous()
        start = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), start)
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        return zlib.crc32(content, start)
    if isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            start = checksum(value[key], zlib.crc32(f"{key!r}:".encode(), start))
        return zlib.crc32(b"}", start)
    if isinstance(value, (list, tuple)):
        for entry in value:
            start = checksum(entry, start)
        return zlib.crc32(b"]", start)
    if isinstance(value, (set, frozenset)):
        return checksum(sorted(value, key=repr), start)
    is_plain = value is None or isinstance(value, (str, bytes, int, float, complex))
    return zlib.crc32((f"{value!r}," if is_plain else type(value).__qualname__).encode(), start)
