"""Reports as files: JSON that any reader takes, read back exactly, written whole or not at all.

JSON has no NaN and no infinity: where a number belongs, they are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning_prune.report.data import FORMAT_VERSION, Report

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(report: Report) -> str:
    """Return the report as JSON text.

    Raises:
        ValueError: a field holds what its type does not allow, e.g. a tensor among the metrics.

    Example:
        >>> from_json(to_json(Report(kind="none"))) == Report(kind="none")
        True
    """
    return json.dumps(_encode("report", report, Report), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """Return the report that `to_json` wrote, in this version or an older one; what that did not know is unknown.

    Raises:
        ValueError: the text is cut short or no report, or a newer version of this library wrote it.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`report` is JSON that lightning_prune wrote, but got text that is none: {error}."
        ) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"`report` is JSON that lightning_prune wrote, with a format_version, but got {_short(data)}."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`format_version` of the report is at most {FORMAT_VERSION}, but got {version}: "
            "a newer lightning_prune wrote it, update to read it."
        )
    report: Report = _decode("report", {**data, "format_version": FORMAT_VERSION}, Report)
    return report


def save(report: Report, path: str | Path) -> Path:
    """Write `report` to `path` as JSON, atomically, and return the path."""
    return write_text(path, to_json(report))


def load(path: str | Path) -> Report:
    """Read the report at `path`.

    Raises:
        ValueError: it is no report, cut short, or newer than this library.
        OSError: it cannot be read.
    """
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_text(path: str | Path, text: str) -> Path:
    """Write a file whole or not at all: beside its place first, then moved there; the folder is created.

    Raises:
        OSError: the folder cannot be written or the disk is full; what was at `path` is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _encode(where: str, value: Any, kind: Any) -> Any:
    """Return `value`, of the declared type `kind`, as plain JSON data."""
    if is_dataclass(kind):
        _check(where, isinstance(value, typing.cast(type, kind)), getattr(kind, "__name__", str(kind)), value)
        return {
            n: _encode(f"{where}.{n}", getattr(value, n), k)
            for n, k in _fields(typing.cast(type, kind)).items()
        }
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _encode(where, value, arguments[0])
    if origin is tuple:
        _check(where, isinstance(value, tuple), "a tuple", value)
        return [_encode(f"{where}[{i}]", entry, arguments[0]) for i, entry in enumerate(value)]
    if origin is Mapping:
        _check(
            where,
            isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
            "a mapping",
            value,
        )
        return {key: _encode(f"{where}.{key}", entry, arguments[1]) for key, entry in value.items()}
    plain = _plain(where, value, kind)
    if kind is float and not math.isfinite(plain):
        return "NaN" if math.isnan(plain) else "Infinity" if plain > 0 else "-Infinity"
    return plain


def _decode(where: str, data: Any, kind: Any) -> Any:
    """Return plain JSON data as a value of the declared type `kind`."""
    if is_dataclass(kind):
        _check(where, isinstance(data, dict), "an object", data)
        return _decode_fields(where, data, typing.cast(type, kind))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if data is None else _decode(where, data, arguments[0])
    if origin is tuple:
        _check(where, isinstance(data, list), "a list", data)
        return tuple(_decode(f"{where}[{i}]", entry, arguments[0]) for i, entry in enumerate(data))
    if origin is Mapping:
        _check(where, isinstance(data, dict), "an object", data)
        return {key: _decode(f"{where}.{key}", entry, arguments[1]) for key, entry in data.items()}
    if kind is float and isinstance(data, str) and data in NOT_FINITE:
        return NOT_FINITE[data]
    return _plain(where, data, kind)


def _decode_fields(where: str, data: Mapping[str, Any], kind: type) -> Any:
    known = _fields(kind)
    if unknown := [name for name in data if name not in known]:
        raise ValueError(f"`{where}` has the fields {list(known)}, but got {unknown} among them.")
    if missing := [name for name in _required(kind) if name not in data]:
        raise ValueError(f"`{where}` has the fields {list(known)}, but got none of the name {missing}.")
    return kind(**{name: _decode(f"{where}.{name}", entry, known[name]) for name, entry in data.items()})


def _plain(where: str, value: Any, kind: type) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float:
        _check(where, is_number, "a number", value)
        return float(value)
    what = {int: "a whole number", str: "text", bool: "true or false"}[kind]
    _check(where, isinstance(value, kind) and (kind is not int or is_number), what, value)
    return kind(value)


def _check(where: str, holds: bool, what: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"`{where}` is {what}, but got {_short(got)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in fields(kind)}


@cache
def _required(kind: type) -> tuple[str, ...]:
    return tuple(e.name for e in fields(kind) if e.default is MISSING and e.default_factory is MISSING)
