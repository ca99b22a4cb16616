"""What a pruning that takes long has done so far, in files: what is interrupted goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.types import Masks
from lightning_prune.model.calls import tensors_of
from lightning_prune.model.plain import parts_of

KEY_FILE = "key.json"
OWN = re.compile(r"[0-9a-f]{16}\.pt|\.[0-9a-f]{16}\.pt\.\d+\.tmp|" + re.escape(KEY_FILE))
"""The names of the files that are written here; whatever else lies in the folder is left alone."""
SECONDS = 60.0  # as much as is lost at most where a process is killed


def check_left(folder: str | Path) -> None:
    """Refuse a folder that no interrupted pruning has left.

    Raises:
        ValueError: it is not there, or holds something else.
    """
    if not (Path(folder) / KEY_FILE).is_file():
        raise ValueError(
            f"`unfinished` is a folder that an interrupted pruning has left, but {folder} is not there."
        )


class Unfinished:
    """A folder with a file for each part that is done: sums of calibration, rounds, layers that a solver is done with.

    Args:
        folder: is made when there is something to put into it.
        key: of what is done, by `key_of`.
        is_wanted: whether somebody has asked to go on from this folder, rather than to begin in it.

    Raises:
        ValueError: it is wanted, and not there, or of something else. One that is not wanted begins anew then.
    """

    def __init__(self, folder: str | Path, key: str, *, is_wanted: bool = False) -> None:
        self.folder, self.key = Path(folder), key
        self._held: dict[str, Callable[[], Any]] = {}
        if is_wanted:
            check_left(folder)
        file = self.folder / KEY_FILE
        known = json.loads(file.read_text(encoding="utf-8")).get("key") if file.is_file() else None
        if is_wanted and known != key:
            raise ValueError(
                f"`unfinished` is a folder that an interrupted pruning has left, but {folder} is of another model, "
                "recipe or data."
            )
        if known not in (None, key):
            self.finish()
        self._written, self._is_patient, self._is_interrupted = time.monotonic(), False, False

    @property
    def is_begun(self) -> bool:
        """Whether anything is kept."""
        return (self.folder / KEY_FILE).is_file()

    def has(self, name: str) -> bool:
        """Whether a part is done."""
        return self._file(name).is_file()

    def read(self, name: str) -> Any:
        """Return what was written of a part, on the CPU."""
        return torch.load(self._file(name), map_location="cpu", weights_only=True)

    def write(self, name: str, value: Any) -> None:
        """Write down a part, whole or not at all: tensors and plain data."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.is_begun:
            (self.folder / KEY_FILE).write_text(json.dumps({"key": self.key}) + "\n", encoding="utf-8")
        file = self._file(name)
        beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        torch.save(value, beside)
        beside.replace(file)

    def hold(self, name: str, make: Callable[[], Any]) -> None:
        """Have something ready that is written at the next `reached` that falls due, in the order of first calls."""
        self._held[name] = make

    def drop(self, name: str) -> None:
        """Forget a part, which another one has overtaken."""
        self._held.pop(name, None)
        self._file(name).unlink(missing_ok=True)

    def reached(self) -> None:
        """Say that all that is held is whole at this moment: it is written after a while, or when interrupted.

        Raises:
            KeyboardInterrupt: there was an interrupt inside of `whole_steps`.
        """
        if self._is_interrupted or time.monotonic() - self._written > SECONDS:
            self.flush()
        if self._is_interrupted:
            self._is_interrupted = False
            raise KeyboardInterrupt

    def flush(self) -> None:
        """Write all that is held at once."""
        for name, make in self._held.items():
            self.write(name, make())
        self._written = time.monotonic()

    @contextmanager
    def whole_steps(self) -> Iterator[None]:
        """Let Ctrl-C wait inside until the next `reached`; a second one does not wait, and loses what is held."""
        if self._is_patient or threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(*_: Any) -> None:
            if self._is_interrupted:
                raise KeyboardInterrupt
            self._is_interrupted = True
            sys.stderr.write("interrupted: once this batch is done; Ctrl-C again does not wait for it\n")

        before, self._is_patient = signal.signal(signal.SIGINT, interrupt), True
        try:
            yield
            self.reached()
        except BaseException:
            self._held = {}  # perhaps half of a step
            raise
        finally:
            signal.signal(signal.SIGINT, before)
            self._is_patient = False

    def finish(self) -> None:
        """Remove the folder, once the whole is done."""
        self._held = {}
        for file in self.folder.glob("*"):
            if OWN.fullmatch(file.name):
                file.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.pt"


def key_of(model: nn.Module, masks: Masks, words: Mapping[str, str], batches: Iterable[Any]) -> str:
    """Return a key that differs where the weights, the masks, the recipe or the calibration data do."""
    found = hashlib.sha256(json.dumps(dict(words), sort_keys=True).encode())
    for name, parameter in model.state_dict().items():
        found.update(name.encode())
        _digest(found, parameter)
    for name, mask in masks.items():
        found.update(name.encode())
        _digest(found, mask)
    for tensor in tensors_of(list(batches)):
        _digest(found, tensor)
    return found.hexdigest()


def _digest(found: Any, tensor: Any) -> None:
    for part in parts_of(tensor) if isinstance(tensor, Tensor) else ():
        plain = part.detach().cpu().contiguous()
        found.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy())
