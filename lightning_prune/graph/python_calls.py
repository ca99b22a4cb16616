"""The Python side of a trace: sizes become traced integers, and sizes that code passes on become equations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.equations import Equation
from lightning_prune.graph.integers import (
    Constant,
    Expression,
    Operation,
    Size,
    TracedFloat,
    TracedInt,
    expression_of,
    is_traced,
)
from lightning_prune.graph.refinement import ConflictError, cut, split_product
from lightning_prune.graph.rules.table import Types
from lightning_prune.graph.types import Type, find, freeze, is_frozen, product

if TYPE_CHECKING:
    from lightning_prune.graph.trace import Tracer


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """A tensor that is multiplied by a factor which follows from the size of a dim, as 1 / sqrt(head_dim) does.

    Args:
        tensor: what is multiplied.
        factor: how the code computes it.
        position: number of operations that had run before.
        where: for messages.
    """

    tensor: Tensor
    factor: Expression
    position: int
    where: str


class PythonCalls(TorchFunctionMode):
    """Watches calls of torch functions from Python."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self._scalars: dict[int, Expression] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self._note_scale(name, args, kwargs)
        result = func(*args, **kwargs)
        if name == "__get__" and isinstance(result, torch.Size):
            return self._sizes(args[0], result)
        if (
            name in ("full", "tensor", "as_tensor", "scalar_tensor")
            and isinstance(result, Tensor)
            and not result.dim()
        ):
            self._note_scalar(args[-1] if args else None, result)
        if name in _SIZES and isinstance(args[0], Tensor):
            return _SIZES[name](self, args, kwargs, result)
        if name in _EQUATIONS:
            _EQUATIONS[name](self, args, kwargs, result)
        return result

    def types(self, tensor: Tensor) -> Types:
        """Return the types of a tensor."""
        return self.tracer.types(tensor)

    @property
    def path(self) -> str:
        """The module that runs."""
        return self.tracer.path[-1]

    def equate(self, value: Any, node: Type, name: str) -> None:
        """Write down that the code passes `value` where a dim of type `node` is; a plain number freezes it.

        `-1` stands for what is left and asks for nothing.
        """
        if not isinstance(value, int) or isinstance(value, bool) or value in (-1, 0, 1):
            return
        where = f"{name} of {self.path or 'the model'}"
        if isinstance(value, TracedInt):
            self.tracer.record.equations.append(Equation(value.expression, node, where))
        elif not is_frozen(node):
            freeze(node, f"size {value} written in {where}")

    def _sizes(self, tensor: Tensor, sizes: Sequence[int]) -> torch.Size:
        pairs = zip(sizes, self.types(tensor), strict=True)
        return torch.Size([self._traced(size, node) for size, node in pairs])

    @staticmethod
    def _traced(size: int, node: Type) -> int:
        return size if type(size) is not int or is_frozen(node) else TracedInt(size, Size(node))

    def _note_scale(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember factors that the code derives from a live size."""
        if name == "scaled_dot_product_attention":
            scale = kwargs.get("scale", args[6] if len(args) > 6 else None)
            node = self.types(args[0])[-1] if args else None
            if scale is None and node is not None and not is_frozen(node):
                self._scale(args[0], Operation(operator.pow, Size(node), Constant(-0.5)))
            elif isinstance(scale, TracedFloat):
                self._scale(args[0], scale.expression)
        elif name in _PRODUCTS and len(args) == 2:
            for tensor, factor in (args, args[::-1]):
                if isinstance(tensor, Tensor) and (found := self._derived(factor)) is not None:
                    self._scale(tensor, found)
        elif name in _QUOTIENTS and len(args) == 2 and isinstance(args[0], Tensor):
            found = self._derived(args[1])
            if found is not None:
                self._scale(args[0], Operation(operator.truediv, Constant(1.0), found))

    def _derived(self, factor: Any) -> Expression | None:
        """Return how a factor, a number or a tensor made of one, follows from sizes; None where it does not."""
        if is_traced(factor):
            return expression_of(factor)
        return self._scalars.get(id(factor)) if isinstance(factor, Tensor) else None

    def _note_scalar(self, value: Any, result: Tensor) -> None:
        if is_traced(value):
            self._scalars[id(result)] = expression_of(value)
            self.types(result)  # keeps it alive

    def _scale(self, tensor: Tensor, factor: Expression) -> None:
        site = ScaleSite(tensor, factor, len(self.tracer.record.ops), self.path or "the model")
        self.tracer.record.scales.append(site)


_PRODUCTS = ("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply")
_QUOTIENTS = ("div", "div_", "true_divide", "__truediv__", "__itruediv__", "divide")


def _size(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> Any:
    if isinstance(result, torch.Size):
        return calls._sizes(args[0], result)
    d = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return calls._traced(result, calls.types(args[0])[d])


def _numel(calls: PythonCalls, args: Any, kwargs: Any, result: Any) -> Any:
    return calls._traced(result, product(calls.types(args[0])))


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
    given = [a for a in args if not isinstance(a, Tensor)]
    sizes = kwargs.get("size") or (given[0] if given and isinstance(given[0], (tuple, list)) else given)
    for value, node in zip(sizes, calls.types(result), strict=False):
        calls.equate(value, node, "a new tensor")


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


_SIZES: dict[str, Callable[..., Any]] = {"size": _size, "numel": _numel, "nelement": _numel}
_EQUATIONS: dict[str, Callable[[PythonCalls, Any, Any, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _view),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(
        ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), _created
    ),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _grouped(6, "groups")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _grouped(6, "groups")),
    "group_norm": _grouped(1, "num_groups"),
    "unflatten": _unflatten,
    "chunk": _chunk,
    "__getitem__": _item,
    "narrow": _narrow,
}
