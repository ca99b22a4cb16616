"""The formats, and what they need. No torch here: the command line refuses what is missing before it is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path, PurePath

FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "safetensors": (".safetensors", ("safetensors",)),
    "compressed": (".safetensors", ("safetensors",)),
    "onnx": (".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "pt2": (".pt2", ()),
}
"""The ending of each format's files, and the packages that it needs."""


def check_installed(format: str) -> None:
    """Refuse a format whose packages are missing.

    Raises:
        ImportError: it names them, and the extra that brings them.
    """
    if missing := [package for package in FORMATS[format][1] if find_spec(package) is None]:
        raise ImportError(
            f"`format` {format!r} needs {' and '.join(missing)}: pip install 'lightning-prune[export]'."
        )


def checked_path(path: str | Path, format: str) -> Path:
    """Return a path with the ending of its format.

    Raises:
        ValueError: it has another ending, by which nobody would know what the file is.

    Example:
        >>> checked_path("model.onnx", "onnx").name
        'model.onnx'
    """
    ending = FORMATS[format][0]
    if PurePath(path).suffix != ending:
        raise ValueError(f"`path` ends in {ending!r}, but got {str(path)!r}.")
    return Path(path)


def checked_filename(name: str | None, format: str) -> str:
    """Return the name of a file within a folder, by default "model" with the ending of the format.

    Raises:
        ValueError: it leads out of the folder, or has another ending.

    Example:
        >>> checked_filename(None, "pt2")
        'model.pt2'
    """
    found = f"model{FORMATS[format][0]}" if name is None else name
    if found in ("", ".", "..") or set(found) & {"/", "\\", ":"}:
        raise ValueError(f"`filename` is a name within the run folder, without a path, but got {name!r}.")
    return checked_path(found, format).name
