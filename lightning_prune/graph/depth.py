"""What can be left out in depth: residual blocks, which return their input plus something, and branches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.record import ModuleCall, Record
from lightning_prune.graph.rules.table import Op

SAME = {"alias", "clone", "detach", "_to_copy", "contiguous", "dropout", "native_dropout"}
"""Operations that hand on what comes in."""
LINEAR = SAME | {"mul", "view", "_unsafe_view"}
"""Operations that make zeros of zeros, on the way from a branch to where it is added."""
MAX_DEPTH = 64
Makers = dict[int, Op]


@dataclass(frozen=True)
class Block:
    """A residual block that can be skipped, or a branch whose sum with the stream can go without it.

    Args:
        path: of the module.
        kind: of the module, its class.
        num_params: of its parameters.
        num_outputs: how long a tuple it returns, or None where it is a tensor.
        argument: the name of its input, where that is passed by keyword.
        is_branch: whether it is added to its stream outside of it.
    """

    path: str
    kind: str
    num_params: int
    num_outputs: int | None = None
    argument: str | None = None
    is_branch: bool = False

    @property
    def replacement(self) -> str:
        """What takes its place, in the words of `Plan.replaced`."""
        kind = "zero" if self.is_branch else "skip"
        return f"{kind}{self.num_outputs or ''}{f':{self.argument}' if self.argument else ''}"


def find_blocks(record: Record) -> dict[str, Block]:
    """Return the smallest modules that add something to their input and return it, by path.

    Each returned a tensor (or a tuple with it in front) of the shape that came in. One that ran several times did so on
    inputs of which none was computed from another: those of a network that is called once more. A ReLU after the
    addition is no hindrance where the input has been through one already.
    """
    made_by = _makers(record)
    found = {
        path: _block(calls[0])
        for path, calls in _calls_alike(record).items()
        if all(_leads_to(call.output, call.input, made_by) for call in calls)
    }
    return {path: block for path, block in found.items() if not _inside(found, path)}


def find_branches(record: Record) -> dict[str, Block]:
    """Return the modules whose output is added to what their input was computed from, by path.

    Where several do so by one addition, as an attention and its output projection, it is the outermost; one that has
    such additions inside of it is none. Each returned the shape that came in, and ran as `find_blocks` says.
    """
    made_by, users = _makers(record), _users(record)
    found: dict[tuple[int, ...], Block] = {}
    for calls in _calls_alike(record).values():  # inner calls return first, so outer ones take their place
        additions = [_added_to(call, users, made_by) for call in calls]
        if None not in additions:
            found[tuple(map(id, additions))] = _block(calls[0], is_branch=True)
    by_path = {block.path: block for block in found.values()}
    return {path: block for path, block in by_path.items() if not _inside(by_path, path)}


def _block(call: ModuleCall, is_branch: bool = False) -> Block:
    num_params = sum(p.numel() for p in call.module.parameters())
    return Block(
        call.path, type(call.module).__name__, num_params, call.num_outputs, call.argument, is_branch
    )


def _inside(paths: Mapping[str, Block], path: str) -> bool:
    return any(other.startswith(f"{path}.") for other in paths)


def _calls_alike(record: Record) -> dict[str, list[ModuleCall]]:
    """Return the calls of each module with parameters whose outputs have the shapes of their inputs, by path.

    One that runs on something that comes of what it has returned is left out.
    """
    calls: dict[str, list[ModuleCall]] = {}
    for call in record.calls:
        calls.setdefault(call.path, []).append(call)
    found = {
        path: some
        for path, some in calls.items()
        if path
        and all(map(_is_alike, some))
        and len({(call.num_outputs, call.argument) for call in some}) == 1
        and any(True for _ in some[0].module.parameters())
    }
    again = _run_again(record, {path: some for path, some in found.items() if len(some) > 1})
    return {path: some for path, some in found.items() if path not in again}


def _run_again(record: Record, calls: Mapping[str, Sequence[ModuleCall]]) -> set[str]:
    """Return the modules of which a later call reads what comes of an earlier one.

    Tensors are told apart by where they lie in memory, so that what is written to a part, or in place, counts too.
    """
    if not calls:
        return set()
    returned: dict[int, set[str]] = {}
    for path, call in ((path, call) for path, some in calls.items() for call in some):
        returned.setdefault(id(call.output), set()).add(path)
    comes_of: dict[int, set[str]] = {}
    for op in record.ops:
        sources = set[str]().union(*(comes_of.get(_memory_of(tensor), ()) for tensor, _ in op.inputs))
        for tensor, _ in op.outputs:
            comes_of.setdefault(_memory_of(tensor), set()).update(sources, returned.get(id(tensor), ()))
    return {
        path
        for path, some in calls.items()
        for call in some[1:]
        if call.input is not None and path in comes_of.get(_memory_of(call.input), ())
    }


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _is_alike(call: ModuleCall) -> bool:
    x, y = call.input, call.output
    return x is not None and y is not None and x is not y and (x.shape, x.dtype) == (y.shape, y.dtype)


def _makers(record: Record) -> Makers:
    return {id(tensor): op for op in record.ops for tensor, _ in op.outputs}


def _users(record: Record) -> dict[int, list[Op]]:
    users: dict[int, list[Op]] = {}
    for op in record.ops:
        for tensor in {id(t): t for t, _ in op.inputs}.values():
            users.setdefault(id(tensor), []).append(op)
    return users


def _leads_to(
    tensor: Tensor | None, goal: Tensor | None, made_by: Makers, added: bool = False, depth: int = 0
) -> bool:
    """Whether a tensor is the goal plus something, along additions only."""
    assert tensor is not None and goal is not None
    if tensor is goal:
        return added
    op = made_by.get(id(tensor))
    if op is None or depth > MAX_DEPTH:
        return False
    if op.name == "add":
        terms = [a for a in op.args[:2] if isinstance(a, Tensor) and a.shape == tensor.shape]
        return any(_leads_to(term, goal, made_by, True, depth + 1) for term in terms)
    if op.name in SAME or (op.name == "relu" and _is_rectified(goal, made_by)):
        return _leads_to(op.args[0], goal, made_by, added, depth + 1)
    if op.name in ("view", "_unsafe_view") and op.args[0].shape == tensor.shape:
        return _leads_to(op.args[0], goal, made_by, added, depth + 1)
    return False


def _is_rectified(tensor: Tensor, made_by: Makers) -> bool:
    """Whether a tensor has no negative entries because it comes out of a ReLU."""
    op = made_by.get(id(tensor))
    while op is not None and (op.name in SAME or "max_pool" in op.name):
        op = made_by.get(id(op.args[0]))
    return op is not None and op.name == "relu"


def _added_to(call: ModuleCall, users: Mapping[int, list[Op]], made_by: Makers) -> Op | None:
    """Return the addition of a module's output to a stream that its input was computed from."""
    assert call.input is not None and call.output is not None
    tensor = call.output
    for _ in range(MAX_DEPTH):
        if len(follow := users.get(id(tensor), [])) != 1:
            return None
        op = follow[0]
        if op.name == "add":
            stream = stream_of(op.name, op.args, op.kwargs, tensor)
            return op if stream is not None and _depends(call.input, stream, made_by) else None
        if op.name not in LINEAR or not op.outputs or op.outputs[0][0].shape != call.output.shape:
            return None
        tensor = op.outputs[0][0]
    return None


def stream_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], branch: Tensor) -> Tensor | None:
    """Return what a branch is added to by an operation; None where it is no plain addition of two like tensors."""
    if name != "add" or kwargs or len(args) != 2 or args[0] is args[1]:
        return None
    other = args[1] if args[0] is branch else args[0]
    return other if isinstance(other, Tensor) and other.shape == branch.shape else None


def _depends(tensor: Tensor, source: Tensor, made_by: Makers) -> bool:
    """Whether a tensor was computed from another one."""
    seen, waiting = set[int](), [tensor]
    while waiting:
        found = waiting.pop()
        if found is source:
            return True
        if id(found) not in seen and (op := made_by.get(id(found))) is not None:
            waiting += [t for t, _ in op.inputs]
        seen.add(id(found))
    return False
