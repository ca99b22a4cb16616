"""Blocks that can be skipped: modules that return their input plus something, so that the input alone fits as well."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_prune.graph.rules.table import Op
from lightning_prune.graph.trace import ModuleCall, Record

SAME = {"alias", "clone", "detach", "_to_copy", "contiguous", "dropout", "native_dropout"}
"""Operations that hand on what comes in."""


@dataclass(frozen=True)
class Block:
    """A residual block that can be skipped.

    Args:
        path: of the module.
        kind: of the module, its class.
        num_params: of its parameters.
        num_outputs: how long a tuple it returns, or None where it is a tensor.
    """

    path: str
    kind: str
    num_params: int
    num_outputs: int | None = None


def find_blocks(record: Record) -> dict[str, Block]:
    """Return the smallest modules that add something to their first argument and return it, by path.

    Each ran exactly once, and returned a tensor (or a tuple with it in front) of the shape that came in. A ReLU after
    the addition is no hindrance where the input has been through one already.
    """
    made_by = {id(tensor): op for op in record.ops for tensor, _ in op.outputs}
    num_calls: dict[str, int] = {}
    for call in record.calls:
        num_calls[call.path] = num_calls.get(call.path, 0) + 1
    found = {}
    for call in record.calls:
        num_params = sum(p.numel() for p in call.module.parameters())
        if call.path and num_calls[call.path] == 1 and num_params and _is_residual(call, made_by):
            found[call.path] = Block(call.path, type(call.module).__name__, num_params, call.num_outputs)
    return {
        path: block
        for path, block in found.items()
        if not any(other.startswith(f"{path}.") for other in found)
    }


def _is_residual(call: ModuleCall, made_by: dict[int, Op]) -> bool:
    x, y = call.input, call.output
    if x is None or y is None or x is y or x.shape != y.shape or x.dtype != y.dtype:
        return False
    return _leads_to(y, x, made_by, added=False)


def _leads_to(tensor: Tensor, goal: Tensor, made_by: dict[int, Op], added: bool, depth: int = 0) -> bool:
    """Whether a tensor is the goal plus something, along additions only."""
    if tensor is goal:
        return added
    op = made_by.get(id(tensor))
    if op is None or depth > 64:
        return False
    if op.name == "add":
        terms = [a for a in op.args[:2] if isinstance(a, Tensor) and a.shape == tensor.shape]
        return any(_leads_to(term, goal, made_by, True, depth + 1) for term in terms)
    if op.name in SAME or (op.name == "relu" and _is_rectified(goal, made_by)):
        return _leads_to(op.args[0], goal, made_by, added, depth + 1)
    if op.name in ("view", "_unsafe_view") and op.args[0].shape == tensor.shape:
        return _leads_to(op.args[0], goal, made_by, added, depth + 1)
    return False


def _is_rectified(tensor: Tensor, made_by: dict[int, Op]) -> bool:
    """Whether a tensor has no negative entries because it comes out of a ReLU."""
    op = made_by.get(id(tensor))
    while op is not None and (op.name in SAME or "max_pool" in op.name):
        op = made_by.get(id(op.args[0]))
    return op is not None and op.name == "relu"
