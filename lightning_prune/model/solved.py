"""Layers that a solver is done with, in files: what is interrupted goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.core.masks import pack, unpack
from lightning_prune.core.types import Name
from lightning_prune.model.calls import tensors_of
from lightning_prune.model.pruning import Pruner

KEY_FILE = "key.json"
OWN = re.compile(r"[0-9a-f]{16}\.pt|\.[0-9a-f]{16}\.pt\.\d+\.tmp|" + re.escape(KEY_FILE))
"""The names of the files that are written here; whatever else lies in the folder is left alone."""


class Solved:
    """A folder with a file for each layer that is solved: its new weight and mask.

    Args:
        folder: is made where it is not there.
        key: of what is solved, by `key_of`.
        is_wanted: whether somebody has asked to go on from this folder, rather than to begin in it.

    Raises:
        ValueError: it is wanted, and not there, or of something else. One that is not wanted begins anew then.
    """

    def __init__(self, folder: str | Path, key: str, *, is_wanted: bool = False) -> None:
        self.folder = Path(folder)
        file = self.folder / KEY_FILE
        known = json.loads(file.read_text(encoding="utf-8")).get("key") if file.is_file() else None
        if is_wanted and known != key:
            got = "is not there" if known is None else "is of another model, recipe or data"
            raise ValueError(
                f"`solved` is a folder of layers that an interrupted run has left, but {folder} {got}."
            )
        if known != key:
            self.finish()
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")

    def has(self, names: Iterable[Name]) -> bool:
        """Whether all of some layers are done."""
        return all(self._file(name).is_file() for name in names)

    def load_(self, pruner: Pruner, names: Iterable[Name]) -> None:
        """Take over weights and masks of layers that are done."""
        for name in names:
            found = torch.load(self._file(name), map_location=pruner.targets[name].device, weights_only=True)
            with torch.no_grad():
                pruner.targets[name].copy_(found["weight"])
            pruner.masks[name] = unpack(name, found["mask"]).to(pruner.targets[name].device)

    def save(self, pruner: Pruner, names: Iterable[Name]) -> None:
        """Write down layers that are done, each whole or not at all."""
        for name in names:
            file = self._file(name)
            beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            held = {"weight": pruner.targets[name].detach().cpu().clone(), "mask": pack(pruner.masks[name])}
            torch.save(held, beside)
            beside.replace(file)

    def finish(self) -> None:
        """Remove the folder, once the whole is done."""
        for file in self.folder.glob("*"):
            if OWN.fullmatch(file.name):
                file.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, name: Name) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.pt"


def key_of(pruner: Pruner, words: Mapping[str, str], batches: Iterable[Any]) -> str:
    """Return a key that differs where the weights, the chosen masks, the recipe or the calibration data do."""
    found = hashlib.sha256(json.dumps(dict(words), sort_keys=True).encode())
    for name, parameter in pruner.model.state_dict().items():
        found.update(name.encode())
        _digest(found, parameter)
    for name, mask in pruner.masks.items():
        found.update(name.encode())
        _digest(found, mask)
    for tensor in tensors_of(list(batches)):
        _digest(found, tensor)
    return found.hexdigest()


def _digest(found: Any, tensor: Any) -> None:
    if isinstance(tensor, Tensor):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy())
