"""Sizes that Python code passes to torch functions: each becomes an equation between the code and a type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_prune.graph.equations import Equation
from lightning_prune.graph.integers import Size, TracedInt
from lightning_prune.graph.refinement import ConflictError, cut, split_product
from lightning_prune.graph.types import Type, find, freeze, is_frozen, product

if TYPE_CHECKING:
    from lightning_prune.graph.python_calls import PythonCalls


def _size(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> Any:
    if isinstance(result, torch.Size):
        return calls.sizes(args[0], result)
    d = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return calls.traced(result, calls.types(args[0])[d])


def _numel(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> Any:
    return calls.traced(result, product(calls.types(args[0])))


def _view(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    sizes = _listed(args[1:]) or kwargs.get("shape") or kwargs.get("sizes") or kwargs.get("size") or ()
    types = calls.types(result)
    for value, node in zip(sizes, types[len(types) - len(sizes) :], strict=False):
        calls.equate(value, node, "view")


def _unflatten(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    d = kwargs.get("dim", args[1] if len(args) > 1 else 0) % args[0].dim()
    sizes = kwargs.get("sizes", args[2] if len(args) > 2 else ())
    for value, node in zip(sizes, calls.types(result)[d:], strict=False):
        calls.equate(value, node, "unflatten")


def _repeat(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    times = _listed(args[1:]) or kwargs.get("repeats") or kwargs.get("dims") or ()
    types = calls.types(result)
    for value, node in zip(times, types[len(types) - len(times) :], strict=False):
        if isinstance(value, int) and value > 1:
            calls.equate(value, split_product(node, int(value))[0], "repeat")


def _created(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    """Tensors of one number stand for sizes, too, as the batch of a packed sequence does."""
    sizes = kwargs.get("size") or (args[0] if args and isinstance(args[0], (tuple, list)) else args)
    for value, node in zip(sizes, calls.types(result), strict=False):
        calls.equate(value, node, "a new tensor")


def _created_like(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    _created(calls, args[1:], kwargs, result)


def _split(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    d = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    given = (
        args[1]
        if len(args) > 1
        else kwargs.get("split_size_or_sections", kwargs.get("split_size", kwargs.get("split_sizes")))
    )
    pieces = [calls.types(piece)[d] for piece in result]
    if isinstance(given, (tuple, list)):
        for value, node in zip(given, pieces, strict=False):
            calls.equate(value, node, "split")
        return
    for node in pieces:
        if find(node).size == given:
            calls.equate(given, node, "split")
        else:
            freeze(node, f"rest of a split of {calls.path or 'the model'}")


def _item(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    """Slices begin and end at sizes of what lies before or behind; numbers written in the code, the replay judges."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    types, d = calls.types(args[0]), 0
    if not all(entry is None or entry is Ellipsis or isinstance(entry, (slice, int)) for entry in index):
        return
    num_given = sum(isinstance(entry, (slice, int)) for entry in index)
    for entry in index:
        if isinstance(entry, slice):
            for value in (entry.start, entry.stop):
                _bound(calls, value, types[d], "slice")
        d += 0 if entry is None else len(types) - num_given if entry is Ellipsis else 1


def _narrow(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    d, start, length = (
        kwargs.get(name, args[place] if len(args) > place else None)
        for place, name in enumerate(("dim", "start", "length"), start=1)
    )
    _bound(calls, start, calls.types(args[0])[d], "narrow")
    if isinstance(length, TracedInt):
        calls.equate(length, calls.types(result)[d], "narrow")


def _bound(calls: PythonCalls, value: Any, node: Type, name: str) -> None:
    """Write down that a part of a dim begins or ends at `value`, which is negative where it counts from the end."""
    size = find(node).size
    if isinstance(value, TracedInt) and 0 < abs(value) < size and not is_frozen(node):
        try:
            before, behind = cut(node, int(value) % size)
        except ConflictError:
            return
        if value < 0:
            calls.equate(-value, behind, name)
        else:
            calls.equate(value, before, name)


def _chunk(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    """Chunks are equally many indices each; where the last one is smaller, all stay as they are."""
    d = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    first, *others = [calls.types(piece)[d] for piece in result]
    for node in others:
        if find(node).size != find(first).size:
            freeze(node, "chunks of unlike size")
            freeze(first, "chunks of unlike size")
        elif not (is_frozen(node) and is_frozen(first)):
            where = f"chunk of {calls.path or 'the model'}"
            calls.tracer.record.equations.append(Equation(Size(first), node, where))


def _norm(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    types = calls.types(args[0])
    for value, node in zip(shape, types[len(types) - len(shape) :], strict=True):
        calls.equate(value, node, "normalized_shape")


def _grouped(position: int, name: str) -> Callable[[PythonCalls, Any, Any, Any], None]:
    def note(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> None:
        value = kwargs.get(name, args[position] if len(args) > position else 1)
        if isinstance(value, int) and value > 1:
            try:
                groups, _ = split_product(calls.types(args[0])[1], int(value))
            except ConflictError:
                return
            calls.equate(value, groups, name)

    return note


def _listed(values: Sequence[Any]) -> Sequence[Any]:
    return values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values


SIZES: Mapping[str, Callable[..., Any]] = {"size": _size, "numel": _numel, "nelement": _numel}
EQUATIONS: Mapping[str, Callable[[PythonCalls, Any, Any, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _view),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _created),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _created_like),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _grouped(6, "groups")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _grouped(6, "groups")),
    "group_norm": _grouped(1, "num_groups"),
    "unflatten": _unflatten,
    "chunk": _chunk,
    "__getitem__": _item,
    "narrow": _narrow,
}
