"""Reading data sets in the formats in which they are published."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def load_idx_or_npz(root: str | Path, folder: str, archive: str) -> dict[str, Tensor]:
    """Read an MNIST-like data set from the first of the forms that lies under `root`.

    Args:
        root: folder that holds `<archive>` with the arrays x_train, y_train, x_test and y_test, or the four published
            IDX files, packed (.gz) or not, in `<folder>/raw` (as torchvision lays them out), `<folder>` or itself.
        folder: e.g. "MNIST".
        archive: e.g. "mnist.npz".

    Returns:
        The four tensors, uint8: images (N, 28, 28), labels (N,).

    Raises:
        ValueError: neither is there; it names what to put where.
    """
    root = Path(root).expanduser()
    if (path := root / archive).is_file():
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name].astype(np.uint8)) for name in IDX_FILES}
    for place in (root / folder / "raw", root / folder, root):
        found = {name: _packed_or_not(place / file) for name, file in IDX_FILES.items()}
        paths = {name: path for name, path in found.items() if path is not None}
        if len(paths) == len(IDX_FILES):
            return {name: read_idx(path) for name, path in paths.items()}
    raise ValueError(
        f"`root` is a folder with {archive}, or with the published files {', '.join(IDX_FILES.values())} (.gz or not) "
        f"in {folder}/raw, {folder} or itself, but got {str(root)!r}, which {_what_is_there(root)}."
    )


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of bytes: two zeros, the type 8, the number of dims, each dim as four bytes, the values.

    Raises:
        ValueError: it is no such file, or it is cut off.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"`root` holds IDX files of bytes, but got {path} that begins with {data[:4]!r}.")
    num_dims = data[3]
    start = 4 + 4 * num_dims
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"`root` holds whole files, but got {path} with {len(data) - start} values for shape {shape}."
        )
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(shape)


def read_text(root: str | Path, file: str) -> str:
    """Read a text file under `root`.

    Raises:
        ValueError: it is not there.
    """
    folder = Path(root).expanduser()
    path = folder / file
    if not path.is_file():
        raise ValueError(
            f"`root` is a folder with {file}, but got {str(root)!r}, which {_what_is_there(folder)}."
        )
    return path.read_text(encoding="utf-8")


def _packed_or_not(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    return path if path.is_file() else packed if packed.is_file() else None


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return "is not there"
    names = sorted(path.name for path in folder.iterdir())
    return f"holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "is empty"
