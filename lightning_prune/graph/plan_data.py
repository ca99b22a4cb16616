"""Plans as plain data: safe in checkpoints that are read with `weights_only=True`, and writable as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_prune.core.patterns import listed
from lightning_prune.graph.plan import Plan, Scale

VERSION = 1
PARTS = ("version", "plans", "checksum")
FIELDS = ("slices", "shapes", "attributes", "scales", "replaced", "groups", "error")


def to_data(plans: Sequence[Plan]) -> dict[str, Any]:
    """Return plans that were carried out one after another as dicts, lists, text and numbers.

    The indices that a dim keeps are written as bits, in hexadecimal. The checksum, SHA-256, is over all the rest.

    Example:
        >>> to_data([Plan({"w": {0: (0, 2)}}, {"w": (3,)})])["plans"][0]["slices"]
        {'w': [[0, '05']]}
    """
    content = {"version": VERSION, "plans": [_written(plan) for plan in plans]}
    return {**content, "checksum": checksum(content)}


def from_data(data: Any) -> tuple[Plan, ...]:
    """Return the plans that `to_data` has written, also after a way through JSON.

    Raises:
        ValueError: a newer version has written them, or they are incomplete or changed.
    """
    if not isinstance(data, Mapping) or (missing := [part for part in PARTS if part not in data]):
        got = f"none of {listed(missing)}" if isinstance(data, Mapping) else repr(type(data).__name__)
        raise ValueError(
            f"`record` has {listed(PARTS)}, but got {got}: it is truncated, or no pruning record."
        )
    version = data["version"]
    if type(version) is not int or not 1 <= version <= VERSION:
        is_newer = type(version) is int and version > VERSION
        raise ValueError(
            f"`version` of the pruning record is in [1, {VERSION}], but got {version!r}: "
            + ("a newer lightning_prune wrote it." if is_newer else "it was changed.")
        )
    if (found := checksum({k: v for k, v in data.items() if k != "checksum"})) != data["checksum"]:
        raise ValueError(
            f"`checksum` of the pruning record is {found}, but got {data['checksum']!r}: it was changed or truncated."
        )
    try:
        return tuple(_read(plan) for plan in data["plans"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            "`plans` of the pruning record are as `to_data` writes them, but got others: it was changed "
            f"({type(error).__name__}: {error})."
        ) from error


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of data in its one canonical form, so that equal content has an equal sum."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _written(plan: Plan) -> dict[str, Any]:
    known: dict[tuple[tuple[int, ...], int], str] = {}  # coupled tensors keep the same indices: stored once

    def bits(kept: tuple[int, ...], size: int) -> str:
        if (kept, size) not in known:
            known[kept, size] = _to_bits(kept, size)
        return known[kept, size]

    return {
        "slices": {
            name: [[dim, bits(kept, plan.shapes[name][dim])] for dim, kept in sorted(dims.items())]
            for name, dims in plan.slices.items()
        },
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "attributes": {
            path: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for path, values in plan.attributes.items()
        },
        "scales": [[s.name, s.dim, list(s.indices), s.factor] for s in plan.scales],
        "replaced": dict(plan.replaced),
        "groups": {name: list(counts) for name, counts in plan.groups.items()},
        "error": plan.error,
    }


def _read(data: Mapping[str, Any]) -> Plan:
    parts = {name: data[name] for name in FIELDS}
    known: dict[str, tuple[int, ...]] = {}
    slices: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, dims in parts["slices"].items():
        for dim, bits in dims:
            slices.setdefault(name, {})[dim] = known[bits] = known.get(bits) or _from_bits(bits)
    return Plan(**{**parts, "slices": slices, "scales": tuple(Scale(*scale) for scale in parts["scales"])})


def _to_bits(kept: Sequence[int], size: int) -> str:
    packed = bytearray((size + 7) // 8)
    for index in kept:
        packed[index >> 3] |= 1 << (index & 7)
    return packed.hex()


def _from_bits(bits: str) -> tuple[int, ...]:
    packed = bytes.fromhex(bits)
    return tuple(8 * place + bit for place, byte in enumerate(packed) for bit in range(8) if byte >> bit & 1)
