"""The plan of a pruning: what is cut from which tensors, as plain data. Carried out, it is the record of a pruning."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_prune.core.patterns import listed

PLAIN = (bool, int, float, str, type(None))
REPLACEMENT = re.compile(r"(skip|zero)(\d*)(?::([A-Za-z_]\w*))?")
"""What can take the place of a module, besides "attention": kind, length of the tuple, name of the input."""


@dataclass(frozen=True)
class Scale:
    """Slices of a tensor that are multiplied by a factor.

    Args:
        name: of the tensor.
        dim: along which the slices lie.
        indices: of the slices, before anything is cut.
        factor: positive.

    Raises:
        ValueError: `factor` is not positive and finite.
    """

    name: str
    dim: int
    indices: tuple[int, ...]
    factor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", tuple(map(int, self.indices)))
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"`factor` of {self.name} is a number above 0, but got {self.factor}.")


@dataclass(frozen=True)
class Plan:
    """What is done to a model: `print` it, compare it, store it, and carry it out with `execute_`.

    Args:
        slices: tensor -> dim -> indices that are kept, ascending, at least one.
        shapes: tensor -> its shape before, of all that are cut or scaled, and of others, to know the model by.
        attributes: path of a module -> attribute -> new value, a plain one or a tuple of such.
        scales: slices that are multiplied, before anything is cut.
        replaced: path of a module -> what takes its place: "attention" (an nn.MultiheadAttention with free inner
            widths), "skip" (its first argument is handed on), "zero" (zeros like that are), "skip2" (within a tuple of
            2, the rest None), "skip:x" (the keyword argument x is its input).
        groups: group -> its size, and how many indices it keeps.
        error: largest relative difference between the masked and the small model, or None where it was not measured.

    Raises:
        ValueError: the parts contradict each other.

    Example:
        >>> plan = Plan({"0.weight": {0: (0, 2)}}, {"0.weight": (3, 4)}, groups={"0.weight": (3, 2)})
        >>> print(plan)
        1 of 1 groups and 1 tensors become smaller: 12 -> 8 entries
        group     size  kept
        0.weight     3     2
        tensor    before  after
        0.weight  3 x 4   2 x 4
    """

    slices: Mapping[str, Mapping[int, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scales: tuple[Scale, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    error: float | None = None

    def __post_init__(self) -> None:
        own = {
            "slices": {n: {int(d): tuple(k) for d, k in dims.items()} for n, dims in self.slices.items()},
            "shapes": {name: tuple(shape) for name, shape in self.shapes.items()},
            "attributes": {
                path: {name: tuple(v) if isinstance(v, (tuple, list)) else v for name, v in values.items()}
                for path, values in self.attributes.items()
            },
            "scales": tuple(self.scales),
            "replaced": dict(self.replaced),
            "groups": {name: tuple(counts) for name, counts in self.groups.items()},
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)
        _check_slices(self)
        _check_rest(self)

    def __str__(self) -> str:
        smaller = {name: counts for name, counts in self.groups.items() if counts[1] < counts[0]}
        before = sum(math.prod(self.shapes[name]) for name in self.slices)
        after = sum(math.prod(self.shape_after(name)) for name in self.slices)
        text = f"{len(smaller)} of {len(self.groups)} groups and {len(self.slices)} tensors become smaller: "
        lines = [f"{text}{before:,} -> {after:,} entries"]
        lines += _table(("group", "size", "kept"), [(n, *map(str, c)) for n, c in smaller.items()], ">")
        shapes = [(n, _written(self.shapes[n]), _written(self.shape_after(n))) for n in self.slices]
        lines += _table(("tensor", "before", "after"), shapes)
        values = [(f"{p}.{n}", str(v)) for p, a in self.attributes.items() for n, v in a.items()]
        lines += _table(("attribute", "value"), values)
        scales = [(s.name, str(s.dim), str(len(s.indices)), f"{s.factor:.4g}") for s in self.scales]
        lines += _table(("scaled", "dim", "slices", "factor"), scales)
        lines += _table(("module", "becomes"), list(self.replaced.items()))
        error = [] if self.error is None else [f"largest relative difference: {self.error:.1e}"]
        return "\n".join(lines + error)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done."""
        return not (self.slices or self.attributes or self.scales or self.replaced)

    def shape_after(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor will have."""
        dims = self.slices.get(name, {})
        return tuple(len(dims[d]) if d in dims else size for d, size in enumerate(self.shapes[name]))

    def differences(self, other: Plan) -> list[str]:
        """Return in words how another plan differs from this one; of equal plans there is nothing to say.

        Example:
            >>> plan = Plan({"w": {0: (0, 2)}}, {"w": (3,)})
            >>> plan.differences(Plan({"w": {0: (0, 1)}}, {"w": (3,)}))
            ['slices of w: {0: (0, 2)} and {0: (0, 1)}']
        """
        found = []
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if not isinstance(mine, dict):
                mine, theirs = {"": mine}, {"": theirs}
            for name in [*mine, *(name for name in theirs if name not in mine)]:
                a, b = (values.get(name, "nothing") for values in (mine, theirs))
                if a != b:
                    found.append(f"{part.name}{f' of {name}' if name else ''}: {_shown(a)} and {_shown(b)}")
        return found


def _check_slices(plan: Plan) -> None:
    for name, dims in plan.slices.items():
        if name not in plan.shapes:
            raise ValueError(f"`shapes` has all tensors of `slices`, but got none for {name}.")
        for dim, kept in dims.items():
            size = plan.shapes[name][dim] if 0 <= dim < len(plan.shapes[name]) else 0
            is_ascending = bool(kept) and list(kept) == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < size
            if not is_ascending:
                raise ValueError(
                    f"`slices` of {name} {plan.shapes[name]} keep ascending indices below the size of an existing dim, "
                    f"at least one, but got {_shown(kept)} for dim {dim}."
                )


def _check_rest(plan: Plan) -> None:
    for scale in plan.scales:
        shape = plan.shapes.get(scale.name, ())
        if not (0 <= scale.dim < len(shape) and all(0 <= i < shape[scale.dim] for i in scale.indices)):
            raise ValueError(
                f"`scales` are of slices of known tensors, but got {_shown(scale)} of shape {shape}."
            )
    for path, how in plan.replaced.items():
        if how != "attention" and not REPLACEMENT.fullmatch(how):
            raise ValueError(
                f'`replaced` by "attention", "skip", "zero", "skip2" or "skip:x", but got {how!r} for {path}.'
            )
    for path, values in plan.attributes.items():
        entries = [e for v in values.values() for e in (v if isinstance(v, tuple) else (v,))]
        if bad := [e for e in entries if not isinstance(e, PLAIN)]:
            raise ValueError(
                f"`attributes` of {path or 'the model'} are plain values, but got {listed(map(repr, bad))}."
            )
    for name, (size, kept) in plan.groups.items():
        if not 0 <= kept <= size:
            raise ValueError(f"`groups` keep at most what they have, but got {kept} of {size} for {name}.")
    if plan.error is not None and not plan.error >= 0:
        raise ValueError(f"`error` is a difference of at least 0, but got {plan.error}.")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], align: str = "<") -> list[str]:
    """Write rows in columns; nothing where there are none."""
    if not (lines := list(rows)):
        return []
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    aligns = ["<", *[align] * (len(head) - 1)]
    return [
        "  ".join(f"{c:{a}{w}}" for c, a, w in zip(line, aligns, widths, strict=True)).rstrip()
        for line in [head, *lines]
    ]


def _written(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "()"


def _shown(value: object, num_shown: int = 100) -> str:
    text = str(value)
    return text if len(text) <= num_shown else f"{text[:num_shown]}..."
