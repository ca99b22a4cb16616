"""Activation statistics: sums over what flows through the layers, by hooks that exist only while they are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.types import Name
from lightning_prune.model.layouts import Layout, Spread, find_input, layout_of
from lightning_prune.model.ranks import from_all, is_distributed


@dataclass(frozen=True)
class _Reading:
    """An activation statistic: features (positions, n) -> total, whose last dim is n; total and count -> n numbers."""

    side: str
    total: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor, int], Tensor]


def _moments(features: Tensor) -> Tensor:
    """Return the sums and the sums of squares, in float64, where their difference loses nothing that matters."""
    exact = features.double()
    return torch.stack([exact.sum(0), exact.square().sum(0)])


def _variance(total: Tensor, count: int) -> Tensor:
    mean, mean_square = (total / count).unbind()
    return (mean_square - mean.square()).clamp_min(0.0)


READINGS: Mapping[str, _Reading] = {
    "input_norm": _Reading("input", lambda x: x.square().sum(0), lambda total, count: total.sqrt()),
    "output_mean": _Reading("output", lambda x: x.abs().sum(0), lambda total, count: total / count),
    "output_positive": _Reading(
        "output", lambda x: (x > 0).float().sum(0), lambda total, count: total / count
    ),
    "output_variance": _Reading("output", _moments, _variance),
}


@dataclass
class _Sum:
    """A running sum per feature, and the number of positions that it is over."""

    reading: _Reading
    layout: Layout
    spread: Spread
    total: Tensor | None = None
    count: int = 0

    @torch.no_grad()
    def add_(self, activation: Tensor) -> None:
        features = activation.detach().movedim(self.layout.feature_dim, -1).flatten(0, -2).float()
        total = self.reading.total(features)
        self.total = total if self.total is None else self.total + total
        self.count += features.shape[0]


class Activations:
    """The activation statistics of each target.

    Args:
        model: the module that holds the targets.
        targets: parameters by name.
        kinds: what to collect, from `READINGS`.

    Raises:
        ValueError: one that cannot be read for a target.
    """

    def __init__(self, model: nn.Module, targets: Mapping[Name, nn.Parameter], kinds: Sequence[str]) -> None:
        owners = {name: owners_of(model, p) for name, p in targets.items()} if kinds else {}
        self._sums = {(kind, name): _sums_for(kind, name, owners[name]) for kind in kinds for name in owners}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sum up over the forward passes inside; without need, no hook is set."""
        by_module: dict[nn.Module, list[_Sum]] = {}
        for total in (t for sums in self._sums.values() for t in sums):
            by_module.setdefault(total.layout.module, []).append(total)

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            for total in by_module[module]:
                seen = output if total.reading.side == "output" else find_input(total.layout, args, kwargs)
                if isinstance(seen, Tensor):
                    total.add_(seen)

        with ExitStack() as stack:
            for module in by_module:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def clear(self) -> None:
        """Forget what was seen."""
        for total in (t for sums in self._sums.values() for t in sums):
            total.total, total.count = None, 0

    def sums(self) -> dict[str, list[tuple[Tensor | None, int]]]:
        """Return the totals and counts so far: "kind.name" -> one for each layer that holds the weight."""
        return {
            f"{kind}.{name}": [(s.total, s.count) for s in sums] for (kind, name), sums in self._sums.items()
        }

    def load_sums(self, found: Mapping[str, Sequence[tuple[Tensor | None, int]]]) -> None:
        """Go on from totals and counts that `sums` returned."""
        for (kind, name), sums in self._sums.items():
            for own, (total, count) in zip(sums, found[f"{kind}.{name}"], strict=True):
                device = next(own.layout.module.parameters()).device
                own.total, own.count = None if total is None else total.to(device), count

    def read(self, kind: str, name: Name) -> Tensor:
        """Return a statistic of one target, in the dims of the weight, over all processes.

        Raises:
            ValueError: nothing was seen of it.
        """
        return _finished(kind, name, self._sums[kind, name])


def owners_of(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold a parameter (several where it is tied), and under which key."""
    return [
        (module, key)
        for module in model.modules()
        for key, found in module.named_parameters(recurse=False, remove_duplicate=False)
        if found is parameter
    ]


def _sums_for(kind: str, name: Name, owners: Sequence[tuple[nn.Module, str]]) -> list[_Sum]:
    reading, sums = READINGS[kind], []
    for owner, key in owners:
        if (layout := layout_of(owner, key)) is None:
            continue
        if (spread := layout.from_input if reading.side == "input" else layout.from_output) is not None:
            sums.append(_Sum(reading, layout, spread))
    if not sums:
        kinds = ", ".join(type(owner).__name__ for owner, _ in owners)
        raise ValueError(
            f"`criterion` asks for `{kind}`, which can be read of linear, convolution and (inputs only) attention "
            f"projections, but `{name}` belongs to {kinds}: exclude it, or choose a criterion without activations."
        )
    return sums


def _finished(kind: str, name: Name, sums: Sequence[_Sum]) -> Tensor:
    """Add up what the layers that hold a weight have seen, in its dims: one may be grouped, and see more features."""
    found = [(s, *_over_processes(s)) for s in sums]
    totals = [_spread(s, total) for s, total, _ in found if total is not None]
    if not totals:
        raise ValueError(
            f"`{name}` has no `{kind}`: nothing flowed through {type(sums[0].layout.module).__name__}.forward, which "
            "was not run, or is not called by what holds it (the output projection of MultiheadAttention). Exclude it."
        )
    count = sum(count for *_, count in found)
    return sums[0].reading.finish(reduce(torch.add, totals), count)


def _spread(of: _Sum, total: Tensor) -> Tensor:
    return of.spread(total) if total.dim() == 1 else torch.stack([of.spread(row) for row in total])


def _over_processes(of: _Sum) -> tuple[Tensor | None, int]:
    """Add up what the processes have seen; some of them may have seen nothing."""
    total, count = of.total, of.count
    if not is_distributed():
        return total, count
    device = next(of.layout.module.parameters()).device
    found = from_all([total.shape[-1] if total is not None else 0, count], device)
    if (width := max(row[0] for row in found)) == 0:
        return None, 0
    total = of.reading.total(torch.zeros(0, width, device=device)) if total is None else total.clone()
    torch.distributed.all_reduce(total)
    return total, sum(row[1] for row in found)
