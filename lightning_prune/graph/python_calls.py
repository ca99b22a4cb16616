"""The Python side of a trace: sizes become traced integers, and sizes that code passes on become equations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
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
from lightning_prune.graph.rules.table import Types
from lightning_prune.graph.types import Type, find, freeze, is_frozen
from lightning_prune.graph.written_sizes import EQUATIONS, SIZES

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
            return self.sizes(args[0], result)
        if (
            name in ("full", "tensor", "as_tensor", "scalar_tensor")
            and isinstance(result, Tensor)
            and not result.dim()
        ):
            self._note_scalar(args[-1] if args else None, result)
        if name in SIZES and isinstance(args[0], Tensor):
            return SIZES[name](self, args, kwargs, result)
        if name in EQUATIONS:
            EQUATIONS[name](self, args, kwargs, result)
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

        `-1` stands for what is left and asks for nothing. A number that is not the dim's size even now is about
        something else; what comes of it, the replay judges.
        """
        if not isinstance(value, int) or isinstance(value, bool) or value in (-1, 0, 1):
            return
        if int(value) != find(node).size:
            return
        where = f"{name} of {self.path or 'the model'}"
        if isinstance(value, TracedInt):
            self.tracer.record.equations.append(Equation(value.expression, node, where))
        elif not is_frozen(node):
            freeze(node, f"size {value} written in {where}")

    def sizes(self, tensor: Tensor, sizes: Sequence[int]) -> torch.Size:
        """Return sizes that remember which dims of a tensor they are of."""
        pairs = zip(sizes, self.types(tensor), strict=True)
        return torch.Size([self.traced(size, node) for size, node in pairs])

    @staticmethod
    def traced(size: int, node: Type) -> int:
        """Return a size that remembers its dim, unless that is frozen."""
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
