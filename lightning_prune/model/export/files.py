"""Files that are written whole or not at all, and safetensors with all that a model needs beside its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lightning_prune.core.types import Name

VERSION = 1
ENTRY = "lightning_prune"
"""Where the header of a file keeps what this library wrote, as JSON text."""
FACTS = ("version", "digest", "packed", "tied", "record", "hyper_parameters")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a place in a folder of its own beside `path`; what was written there is moved when all has gone well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir()):
            file.replace(path.parent / file.name)


def write_tensors(path: Path, tensors: Mapping[Name, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts as one safetensors file, with a digest over all of it.

    Args:
        path: of the file.
        tensors: contiguous, on the CPU; none shares memory with another.
        facts: plain data: all of `FACTS` but version and digest.
    """
    from safetensors.torch import save_file

    held = {"version": VERSION, **facts}
    text = json.dumps({**held, "digest": _digest(tensors, held)})
    with staged(path) as place:
        save_file(dict(tensors), place, metadata={"format": "pt", ENTRY: text})


def read_tensors(path: str | Path) -> tuple[dict[Name, Tensor], dict[str, Any]]:
    """Return the tensors and facts of a file that `write_tensors` wrote.

    Raises:
        ValueError: it is cut short or was changed, a newer version or something else wrote it.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` is a safetensors file, but got {str(path)!r}, which is not there.")
    try:
        with safe_open(path, framework="pt") as file:
            facts = _facts(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"`path` is a whole safetensors file, but got {path}, which is cut short or damaged: {error}."
        ) from None
    if _digest(tensors, {name: fact for name, fact in facts.items() if name != "digest"}) != facts["digest"]:
        raise ValueError(
            f"`path` is a file as it was written, but the digest of {path} is another: it was changed."
        )
    return tensors, facts


def _facts(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        facts = json.loads(metadata[ENTRY])
        version = facts["version"]
        if not isinstance(version, int) or isinstance(version, bool):
            raise TypeError(version)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(
            f"`path` is a file that lightning_prune wrote, but got {path}, which is none."
        ) from None
    if version > VERSION:
        raise ValueError(
            f"`version` of a file is at most {VERSION}, but got {version}: a newer lightning_prune wrote {path}."
        )
    if set(facts) != set(FACTS):
        raise ValueError(f"`path` is a file as it was written, but the header of {path} was changed.")
    return dict(facts)


def _digest(tensors: Mapping[Name, Tensor], facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 over facts, names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
