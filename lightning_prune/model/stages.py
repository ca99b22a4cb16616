"""In which order the layers of a model are solved, and what has to run to see their inputs.

A model whose blocks run one after the other, as the decoder layers of a language model do, is walked through block by
block: what flows into a block is kept, so that each block runs twice and the memory is that of one block and the
activations between two. Of other models, each layer is a stage of its own that runs the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.checks import did_you_mean
from lightning_prune.core.types import Name
from lightning_prune.model.matrices import Matrix

Run = Callable[[], None]


@dataclass(frozen=True)
class Stage:
    """Layers whose inputs are seen together.

    Args:
        names: of their weights.
        run: runs what they are part of on all calibration data.
        leave: is called when they are solved.
    """

    names: tuple[Name, ...]
    run: Run
    leave: Run = field(default=lambda: None)


@dataclass(eq=False)
class _Call:
    """What a block was called with besides the hidden state, and how that was passed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    argument: str | None

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.argument is None:
            output = block(hidden, *self.args, **self.kwargs)
        else:
            output = block(**{self.argument: hidden}, **self.kwargs)
        return _first(output)


def stages_of(
    model: nn.Module,
    matrices: Mapping[Name, Matrix],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
    blocks: str | None = None,
) -> Iterator[Stage]:
    """Yield the stages in the order in which the layers run.

    Args:
        model: in eval mode.
        matrices: the layers that are solved.
        batches: calibration data, at least one batch.
        forward: (model, batch) -> anything.
        blocks: path of the module that holds the blocks; by default the longest chain that is found.

    Raises:
        ValueError: `blocks` is no chain, or a layer does not run.
    """
    order = _order(model, matrices, lambda: forward(model, batches[0]))
    chain = _find_chain(model, lambda: forward(model, batches[0]), blocks)
    inside = [[n for n in order if matrices[n].module in set(block.modules())] for block in chain]
    first = next((n for names in inside for n in names), None)
    before = order[: order.index(first)] if first is not None else order
    known = {name for names in (*inside, before) for name in names}
    run_all = _all(lambda batch: forward(model, batch), batches)
    for name in before:
        yield Stage((name,), run_all)
    if first is not None:
        yield from _walk(chain, inside, batches, forward, model)
    for name in (n for n in order if n not in known):
        yield Stage((name,), run_all)


def _all(run: Callable[[Any], Any], batches: Sequence[Any]) -> Run:
    def every() -> None:
        for batch in batches:
            run(batch)

    return every


def _walk(
    chain: Sequence[nn.Module],
    names: Sequence[Sequence[Name]],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
    model: nn.Module,
) -> Iterator[Stage]:
    hidden, calls = [], []
    for batch in batches:
        with _caught(chain) as caught:
            forward(model, batch)
        hidden.append(caught[0][1])
        calls.append([call for call, _ in caught])
        del caught
    for index, block in enumerate(chain):

        def run(block: nn.Module = block, index: int = index) -> None:
            for state, called in zip(hidden, calls, strict=True):
                called[index](block, state)

        def leave(block: nn.Module = block, index: int = index) -> None:
            for place, called in enumerate(calls):
                hidden[place] = called[index](block, hidden[place])

        if names[index]:
            yield Stage(tuple(names[index]), run, leave)
        else:
            leave()


@contextmanager
def _caught(chain: Sequence[nn.Module]) -> Iterator[list[tuple[_Call, Tensor]]]:
    """Catch what each block is called with; of the hidden states only the first is kept alive."""
    found: list[tuple[_Call, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, argument = _hidden(args, kwargs)
        rest = {name: _without_cache(name, value) for name, value in kwargs.items() if name != argument}
        found.append((_Call(args[1:], rest, argument), hidden if not found else hidden.new_empty(0)))

    with ExitStack() as stack:
        for block in chain:
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield found


def _without_cache(name: str, value: Any) -> Any:
    """Return an argument without the memory of earlier tokens, which would grow with each run."""
    if name == "use_cache":
        return False
    return None if type(value).__name__.endswith("Cache") else value


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, str | None]:
    if args:
        return args[0], None
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return kwargs[name], name


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


def _order(model: nn.Module, matrices: Mapping[Name, Matrix], run: Run) -> list[Name]:
    """Return the layers in the order in which they run first."""
    found: dict[Name, None] = {}
    with ExitStack() as stack:
        for name, matrix in matrices.items():

            def hook(*_: Any, name: Name = name) -> None:
                found.setdefault(name)

            stack.callback(matrix.module.register_forward_pre_hook(hook).remove)
        with torch.no_grad():
            run()
    if silent := [name for name in matrices if name not in found]:
        raise ValueError(f"`{silent[0]}`: nothing flowed through its layer on calibration data. Exclude it.")
    return list(found)


def lists_in(model: nn.Module, path: str | None) -> dict[str, list[nn.Module]]:
    """Return the lists of modules in a model, or the one that lies at a path.

    Raises:
        ValueError: none lies there.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    }
    if path is None:
        return lists
    if path not in lists:
        raise ValueError(
            f"`blocks` is the path of an nn.ModuleList or nn.Sequential, but got {path!r}."
            f"{did_you_mean(path, list(lists))}"
        )
    return {path: lists[path]}


def _find_chain(model: nn.Module, run: Run, path: str | None) -> list[nn.Module]:
    """Return the longest list of modules of which each reads what the one before returns; empty where there is none."""
    lists = lists_in(model, path)
    seen = _seen({block for blocks in lists.values() for block in blocks}, run)
    chains = [blocks for blocks in lists.values() if _is_chain(blocks, seen)]
    if path is not None and not chains:
        raise ValueError(
            f"`blocks` run one after the other, each once and on what the one before returns, but got {path!r}."
        )
    return max(chains, key=len, default=[])


Seen = dict[nn.Module, list[tuple[Any, Any]]]


def _seen(modules: set[nn.Module], run: Run) -> Seen:
    """Return what each module was called with and what it returned."""
    seen: Seen = {}

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        seen.setdefault(module, []).append((tensors[0] if tensors else None, output))

    with ExitStack() as stack, torch.no_grad():
        for module in modules:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        run()
    return seen


def _is_chain(blocks: Sequence[nn.Module], seen: Seen) -> bool:
    if any(len(seen.get(block, [])) != 1 for block in blocks) or len({type(block) for block in blocks}) > 1:
        return False
    calls = [seen[block][0] for block in blocks]
    links = all(b[0] is not None and b[0] is _first(a[1]) for a, b in pairwise(calls))
    return links and isinstance(calls[0][0], Tensor)
