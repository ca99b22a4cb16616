"""Proof that a model without some blocks does what it does when they add nothing: both are run in float64.

As for channels, the dense model runs twice and nothing is touched: once with all its blocks, of which those that go
add zeros, and once with `Skip` in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.graph import Block, Couplings
from lightning_prune.graph.depth import LINEAR, SAME
from lightning_prune.graph.run import plain_name
from lightning_prune.model.calls import Call, replaying
from lightning_prune.model.equivalence import (
    OWN_TOLERANCE,
    TOLERANCE,
    VacuousProofWarning,
    compared,
    largest_difference,
    num_until,
)
from lightning_prune.model.probes import Probe, says_something
from lightning_prune.model.standins import StandIns
from lightning_prune.model.surgery import replace_

HANDED_ON = SAME | {"add", "view", "_unsafe_view"}
Blocks = Mapping[str, Block]


def settle_blocks(
    couplings: Couplings, call: Call, choose: Callable[[], Blocks], freeze: Callable[[str, str], None]
) -> tuple[list[str], float]:
    """Return which blocks go, and the error of the model without them, which is proved to be none.

    Args:
        couplings: of the dense model.
        call: the example call, which also runs without the blocks as it is, by the kernels that it will run by.
        choose: returns the blocks that are to go, by path; without those that were frozen.
        freeze: called with the path of a block that cannot go, and the reason.

    Returns:
        Paths, and the largest relative difference, in [0, tolerance]; it is 0.0 where no block goes.
    """
    while blocks := choose():
        error, reason = _compared(couplings, call, blocks)
        if reason is None:
            return list(blocks), error
        freeze(*_first_in_the_way(couplings, call, blocks))
    return [], 0.0


def _first_in_the_way(couplings: Couplings, call: Call, blocks: Blocks) -> tuple[str, str]:
    """Return the first of some blocks with which the models differ, and the reason."""
    paths = list(blocks)

    def why(some: Sequence[str]) -> str | None:
        return _compared(couplings, call, {path: blocks[path] for path in some})[1]

    num = num_until(paths, lambda some: why(some) is None)
    reason = why(paths[:num])
    assert reason is not None
    return paths[num - 1], reason + _said_of_tuple(blocks[paths[num - 1]])


def _said_of_tuple(block: Block) -> str:
    """Say what becomes of a tuple that a block returns; nothing where it returns a tensor."""
    if (block.num_outputs or 0) < 2:
        return ""
    first = "zeros" if block.is_branch else "its input"
    return f"; of the {block.num_outputs} that it returns, the first becomes {first} and the rest None"


def _compared(couplings: Couplings, call: Call, blocks: Blocks) -> tuple[float, str | None]:
    """Return the error of the model without some blocks, and why the last of them cannot go, or None."""
    root = couplings.run.root
    try:
        with replaying(root, call) as again, _without(root, blocks):
            again()
        error, wide = compared(partial(_difference, couplings, blocks), couplings)
    except VacuousProofWarning:
        raise
    except Exception as raised:  # whatever the model raises
        return float("inf"), f"the model does not run without it: {type(raised).__name__}: {raised}"
    if error <= (TOLERANCE if wide else OWN_TOLERANCE):
        return error, None
    return error, f"the model without it would differ by {error:.1e} from the one in which it adds nothing"


def _difference(couplings: Couplings, blocks: Blocks, probe: Probe, wide: bool) -> tuple[float, bool]:
    """Return the difference on one call, and whether the model with blocks that add nothing says anything there."""
    models, root = StandIns(couplings, probe.tensors, wide=wide), couplings.run.root
    nothing = _Nothing()
    masked = models.dense(probe.args, probe.kwargs, _adding(nothing, root, blocks))
    masked = [tensor for tensor in masked if tensor not in nothing.own]
    small = models.dense(probe.args, probe.kwargs, _without(root, blocks))
    return largest_difference(masked, small), says_something(masked)


@contextmanager
def _without(root: nn.Module, blocks: Blocks) -> Iterator[None]:
    """Put `Skip` in the places of blocks for a while."""
    with ExitStack() as undo:
        for path, block in blocks.items():
            replace_(root, path, block.replacement, undo)
        yield


@contextmanager
def _adding(nothing: _Nothing, root: nn.Module, blocks: Blocks) -> Iterator[None]:
    """Let blocks run and add nothing for a while."""
    with ExitStack() as stack:
        for path, block in blocks.items():
            module = root.get_submodule(path)
            begin, end = partial(nothing.begin, block), partial(nothing.end, block)
            stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        stack.enter_context(nothing)
        yield


class _Nothing(TorchDispatchMode):
    """Puts zeros into additions: in a block for all that is added to its input, after a branch for what it returned.

    All else is computed as ever: what a block does to its input in place, or to a factor of it, shows in the outputs.
    What it returns besides, such as the weights of an attention, goes with the block; it is `own`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own: Any = WeakTensorKeyDictionary()
        self.is_inside = False
        self.streams: dict[int, Tensor] = {}
        """The input of the block that runs, and what hands it on."""
        self.branches: dict[int, Tensor] = {}
        """What branches have returned, until it is added to something."""

    def begin(self, block: Block, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs[block.argument or ""]
        self.is_inside, self.streams = True, {} if block.is_branch else {id(x): x}

    def end(self, block: Block, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        y = output[0] if isinstance(output, (tuple, list)) else output
        self.is_inside, self.streams = False, {}
        self.own.pop(y, None)
        if block.is_branch:
            self.branches[id(y)] = y

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = plain_name(func)
        is_addition, in_place = name == "add", func._schema.name.endswith("_")
        output = func(*(self._silenced(args, in_place) if is_addition else args), **(kwargs or {}))
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if made:
            self._follow(name, args, made[0])
        if self.is_inside:
            self.own.update((t, None) for t in made if all(t is not given for given in args))
        return output

    def _silenced(self, args: tuple[Any, ...], in_place: bool) -> tuple[Any, ...]:
        """Return the terms of an addition, zeros in the place of what blocks add."""
        is_stream = [id(term) in self.streams for term in args[:2]]
        terms = list(args)
        for place, term in enumerate(args[:2]):
            if self.branches.pop(id(term), None) is not None or (any(is_stream) and not is_stream[place]):
                terms[place] = _zeros(term, in_place and place == 0)
        return tuple(terms)

    def _follow(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        """Note what an operation makes of a stream, or of what a branch has returned."""
        terms = [term for term in args[:2] if isinstance(term, Tensor) and term.shape == output.shape]
        if name in LINEAR and any(id(term) in self.branches for term in terms):
            self.branches[id(output)] = output
        if any(id(term) in self.streams for term in terms) and (
            name in HANDED_ON or (name == "relu" and torch.equal(args[0], output))
        ):
            self.streams[id(output)] = output


def _zeros(term: Any, in_place: bool) -> Any:
    """Return zeros like a term of an addition, a tensor or a number."""
    if not isinstance(term, Tensor):
        return 0
    return term.zero_() if in_place else torch.zeros_like(term)
