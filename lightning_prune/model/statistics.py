"""Reads off a model what a criterion asks for, and nothing else.

`weight` and `name` cost nothing; `input_norm`, `output_mean` and `output_positive` are summed up by forward hooks
that exist only inside of `watch`; `grad` is the gradient at the last optimizer step; `movement` is summed up over
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.checks import did_you_mean
from lightning_prune.core.types import Name, Stats
from lightning_prune.model.layouts import Layout, Spread, find_input, layout_of
from lightning_prune.model.surgery import sliced

GRADIENTS = ("grad", "movement")


@dataclass(frozen=True)
class _Reading:
    """An activation statistic: summed over all but the features, then finished."""

    side: str
    summand: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor, int], Tensor]


ACTIVATIONS: Mapping[str, _Reading] = {
    "input_norm": _Reading("input", torch.square, lambda total, count: total.sqrt()),
    "output_mean": _Reading("output", torch.abs, lambda total, count: total / count),
    "output_positive": _Reading("output", lambda x: (x > 0).float(), lambda total, count: total / count),
}
KNOWN = ("weight", "name", *GRADIENTS, *ACTIVATIONS)


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
        total = self.reading.summand(features).sum(0)
        self.total = total if self.total is None else self.total + total
        self.count += features.shape[0]


class Statistics:
    """What is known of each target, as far as it was asked for.

    Args:
        model: the module that holds the targets.
        targets: parameters by name.
        names: the statistics to collect, from `KNOWN`.

    Raises:
        ValueError: an unknown statistic, or one that cannot be read for a target.
    """

    def __init__(self, model: nn.Module, targets: Mapping[Name, nn.Parameter], names: Sequence[str]) -> None:
        for name in names:
            if name not in KNOWN:
                raise ValueError(
                    f"`criterion` asks for statistics among {list(KNOWN)}, but got {name!r}.{did_you_mean(name, KNOWN)}"
                )
        self.targets, self.names = dict(targets), tuple(names)
        self.gradients: dict[str, dict[Name, Tensor]] = {name: {} for name in names if name in GRADIENTS}
        self._pending: dict[str, dict[Name, Tensor]] = {}
        self._sums = self._new_sums(model)

    @property
    def activations(self) -> tuple[str, ...]:
        """The statistics that need hooks on forward passes."""
        return tuple(name for name in self.names if name in ACTIVATIONS)

    def _new_sums(self, model: nn.Module) -> dict[tuple[str, Name], list[_Sum]]:
        owners = {name: _owners(model, p) for name, p in self.targets.items()} if self.activations else {}
        return {(kind, n): _sums_for(kind, n, owners[n]) for kind in self.activations for n in owners}

    def cut_(self, model: nn.Module, slices: Mapping[Name, Mapping[int, Sequence[int]]]) -> None:
        """Follow a model that has become smaller: gradients and movement are cut alike, activations start anew."""
        for found in (*self.gradients.values(), *self._pending.values()):
            found |= {name: sliced(found[name], dims) for name, dims in slices.items() if name in found}
        self._sums = self._new_sums(model)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sum up activations over the forward passes inside; without need, no hook is set."""
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

    @torch.no_grad()
    def note_gradients(self, among: Container[int] | None = None) -> None:
        """Note the gradients of all targets, or of those whose ids are `among` the given ones, before a step.

        They count once `confirm` says that the step was taken: mixed precision may skip it.
        """
        for name, p in self.targets.items():
            if p.grad is not None and (among is None or id(p) in among):
                for kind in self.gradients:
                    noted = p.grad.detach().clone() if kind == "grad" else -p.detach() * p.grad
                    self._pending.setdefault(kind, {})[name] = noted

    def confirm(self) -> None:
        """Take over what was noted: the step was real."""
        for kind, noted in self._pending.items():
            found = self.gradients[kind]
            for name, value in noted.items():
                found[name] = found[name] + value if kind == "movement" and name in found else value
        self._pending = {}

    @property
    def is_complete(self) -> bool:
        """Whether every gradient that was asked for has been seen."""
        return all(found.keys() == self.targets.keys() for found in self.gradients.values())

    def clear(self) -> None:
        """Forget activations and gradients, but for the movement, which goes on."""
        self.gradients = {kind: found if kind == "movement" else {} for kind, found in self.gradients.items()}
        for total in (t for sums in self._sums.values() for t in sums):
            total.total, total.count = None, 0

    def read(self) -> Mapping[Name, Stats]:
        """Return the statistics of each target; activations are summed over the processes first.

        Raises:
            ValueError: nothing was seen of a target.
        """
        stats: dict[Name, dict[str, Any]] = {name: {} for name in self.targets}
        for kind in self.names:
            for name, parameter in self.targets.items():
                stats[name][kind] = self._one(kind, name, parameter)
        return stats

    def _one(self, kind: str, name: Name, parameter: nn.Parameter) -> Any:
        if kind in ("weight", "name"):
            return parameter.detach() if kind == "weight" else name
        if kind in GRADIENTS:
            if name not in self.gradients[kind]:
                raise ValueError(
                    f"`{name}` has no `{kind}`: no gradient reached it. Exclude it, or prune after a backward pass."
                )
            return self.gradients[kind][name]
        return _finished(kind, name, self._sums[kind, name]).to(parameter.device, torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what outlives an update: the movement."""
        return dict(self.gradients.get("movement", {}))

    def load_state_dict(self, state: Mapping[Name, Tensor]) -> None:
        """Restore the movement."""
        for name, tensor in state.items():
            self.gradients["movement"][name] = tensor.to(self.targets[name].device)


def _owners(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold a parameter (several where it is tied), and under which key."""
    return [
        (module, key)
        for module in model.modules()
        for key, found in module.named_parameters(recurse=False, remove_duplicate=False)
        if found is parameter
    ]


def _sums_for(kind: str, name: Name, owners: Sequence[tuple[nn.Module, str]]) -> list[_Sum]:
    reading, sums = ACTIVATIONS[kind], []
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
    seen = [s for s in sums if s.total is not None]
    if not seen:
        raise ValueError(
            f"`{name}` has no `{kind}`: nothing flowed through {type(sums[0].layout.module).__name__}.forward, which "
            "was not run, or is not called by what holds it (the output projection of MultiheadAttention). Exclude it."
        )
    total = torch.stack([s.total for s in seen if s.total is not None]).sum(0)
    count = torch.tensor(sum(s.count for s in seen), device=total.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(count)
    return seen[0].spread(seen[0].reading.finish(total, int(count)))
