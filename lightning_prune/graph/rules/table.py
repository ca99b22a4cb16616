"""The table of rules, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_prune.graph.types import Type, freeze, frozen_type

Types: TypeAlias = list[Type]
"""The type of each dim of a tensor."""
Rule: TypeAlias = "Callable[[Op], Types | Sequence[Types] | None]"

_RULES: dict[str, Rule] = {}


@dataclass(eq=False)
class Op:
    """One call of an ATen operation.

    Args:
        name: of the operation, without namespace, overload and the underscore of in-place forms.
        func: the overload that was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned.
        path: of the module that called it.
        types: tensor -> the type of each of its dims.
        macs: sets of types whose sizes multiply to multiply-accumulates; rules of products fill it.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    path: str
    types: Callable[[Tensor], Types]
    macs: list[Types] = field(default_factory=list)
    inputs: list[tuple[Tensor, Types]] = field(default_factory=list)
    outputs: list[tuple[Tensor, Types]] = field(default_factory=list)

    def __getitem__(self, position: int) -> Types | None:
        """Return the types of a positional argument, or None where that is no tensor."""
        tensor = self.argument(position)
        return self.types(tensor) if isinstance(tensor, Tensor) else None

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        """Return an argument by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def first(self) -> Types:
        """The types of the first argument, a tensor."""
        found = self[0]
        assert found is not None, self.name
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) output."""
        output = self.output if isinstance(self.output, Tensor) else self.output[0]
        return tuple(output.shape)

    def dim(self, position: int, name: str = "dim", default: int = 0, extra: int = 0) -> int:
        """Return an argument that names a dim of the first input, counted from the front."""
        value = self.argument(position, name, default)
        return int(value) % (len(self.first) + extra)

    def dims(self, position: int, name: str = "dim") -> set[int]:
        """Return an argument that names dims of the first input; all where it is left out."""
        value, num = self.argument(position, name), len(self.first)
        if value is None or value == [] or isinstance(value, bool):
            return set(range(num))
        listed = [value] if isinstance(value, int) else value
        return {d % num for d in listed} if num else set()


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table, for operations of these names."""

    def enter(function: Rule) -> Rule:
        for name in names:
            assert name not in _RULES, name
            _RULES[name] = function
        return function

    return enter


def register_rule(name: str, function: Rule) -> None:
    """Say how an operation of your own changes dimension types; without a rule it freezes all that it touches.

    Args:
        name: of the operation, as `torch.ops.<namespace>.<name>`, without its namespace.
        function: op -> a list with the type of each dim of the output (a tuple of lists for several outputs);
            `op[i]` are the types of argument i, and helpers of `lightning_prune.graph.types` (`unify`, `product`,
            `cut`, `freeze`, ...) say what belongs together.

    Raises:
        ValueError: `name` is empty or has a namespace.

    Example:
        >>> from lightning_prune.graph import register_rule
        >>> register_rule("my_scaled_identity", lambda op: op.first)
    """
    if not name.isidentifier():
        raise ValueError(f"`name` is that of an operation, without namespace or overload, but got {name!r}.")
    _RULES[name] = function


def rule_of(func: Any, name: str) -> Rule | None:
    """Return the rule for an operation, the one of all pointwise ones where that is enough, or None."""
    if name in _RULES:
        return _RULES[name]
    return _RULES["pointwise"] if torch.Tag.pointwise in func.tags else None


def freeze_all(types: Types, reason: str) -> None:
    """Freeze the types of a tensor."""
    for node in types:
        freeze(node, reason)


def frozen(shape: Sequence[int], reason: str) -> Types:
    """Return frozen types for a shape."""
    return [frozen_type(size, reason) for size in shape]
