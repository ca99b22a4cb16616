"""States that callbacks find in a checkpoint, which somebody may have changed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

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
    """Put a checksum into the state of a callback that a checkpoint holds, if there is one."""
    if state := checkpoint.get("callbacks", {}).get(callback.state_key):
        state[SEAL] = checksum({name: value for name, value in state.items() if name != SEAL})


def check_seal(callback: L.Callback, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a state that is not as it was saved: masks that are missing would let weights grow back unnoticed.

    Raises:
        ValueError: it has another checksum. States without one, as other versions wrote them, are let through.
    """
    state = checkpoint.get("callbacks", {}).get(callback.state_key)
    if not isinstance(state, Mapping) or SEAL not in state:
        return
    found = checksum({name: value for name, value in state.items() if name != SEAL})
    if found != state[SEAL]:
        raise ValueError(
            f"`ckpt_path` holds a state of {type(callback).__name__} as it was saved, but got one that was changed "
            f"since: its checksum is {found}, not {state[SEAL]}. Resume from another checkpoint."
        )


def checksum(value: object, start: int = 0) -> int:
    """Return the CRC-32 of plain data and tensors, wherever these lie; lists are as good as tuples.

    Args:
        value: mappings, sequences, tensors, and what their `repr` tells all of.
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
    return zlib.crc32(f"{value!r},".encode(), start)
