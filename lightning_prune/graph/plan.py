"""The plan of a pruning: what is cut from which tensors, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """Slices of a tensor that are multiplied by a factor.

    Args:
        name: of the tensor.
        dim: along which the slices lie.
        indices: of the slices, before anything is cut.
        factor: positive.
    """

    name: str
    dim: int
    indices: tuple[int, ...]
    factor: float


@dataclass(frozen=True)
class Plan:
    """What is done to a model.

    Args:
        slices: tensor -> dim -> indices that are kept, ascending.
        shapes: tensor -> its shape before.
        attributes: path of a module -> attribute -> new value.
        scales: slices that are multiplied.
        replaced: path of a module -> what takes its place, "attention" or "skip".
        groups: group -> its size, and how many indices it keeps.
        error: largest relative difference between the masked and the small model, or None where it was not measured.
    """

    slices: Mapping[str, Mapping[int, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, Any]]
    scales: tuple[Scale, ...] = ()
    replaced: Mapping[str, str] = None  # type: ignore[assignment]
    groups: Mapping[str, tuple[int, int]] = None  # type: ignore[assignment]
    error: float | None = None
