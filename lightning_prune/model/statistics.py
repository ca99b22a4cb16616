"""Reads off a model what a criterion asks for, and nothing else.

`weight` and `name` cost nothing; activations are summed up by forward hooks that exist only inside of `watch`; `grad`
is the gradient at the last optimizer step, or the mean over calibration batches; `grad_mean` and `grad_square` are the
means of it and of its square over the steps since the last update, or over the batches; `movement` is summed up over
all steps.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.checks import did_you_mean
from lightning_prune.core.types import Name, Stats
from lightning_prune.graph.sandbox import eager
from lightning_prune.model import activations, gradients, norm_scales
from lightning_prune.model.activations import Activations
from lightning_prune.model.gradients import Gradients
from lightning_prune.model.norm_scales import NormScales
from lightning_prune.model.shards import local

ACTIVATIONS = (*activations.READINGS, norm_scales.KIND)
KNOWN = ("weight", "name", *gradients.KINDS, *ACTIVATIONS)


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
        self.from_gradients = Gradients(self.targets, self.gradients)
        self._from_activations = Activations(model, self.targets, self._readings)
        self._from_norms = NormScales(model, self.targets if norm_scales.KIND in names else {})

    @property
    def activations(self) -> tuple[str, ...]:
        """The statistics that need hooks on forward passes."""
        return tuple(name for name in self.names if name in ACTIVATIONS)

    @property
    def _readings(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in activations.READINGS)

    @property
    def gradients(self) -> tuple[str, ...]:
        """The statistics that need a backward pass, or several."""
        return tuple(name for name in self.names if name in gradients.KINDS)

    @property
    def needs_loss(self) -> bool:
        """Whether calibration needs the gradient of a loss; the flow, which is no loss's, does without."""
        return needs_loss(self.names)

    @property
    def is_running(self) -> bool:
        """Whether the gradients of all steps in training count, not only those at an update."""
        return any(name in gradients.RUNNING for name in self.names)

    def cut_(self, model: nn.Module, slices: Mapping[Name, Mapping[int, Sequence[int]]]) -> None:
        """Follow a model that has become smaller: gradients and movement are cut alike, activations start anew."""
        self.from_gradients.cut_(slices)
        self._from_activations = Activations(model, self.targets, self._readings)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sum up activations over the forward passes inside; without need, no hook is set."""
        stance = eager() if self.activations else nullcontext()  # what is compiled knows no later hooks
        with stance, self._from_activations.watch(), self._from_norms.watch():
            yield

    def note_gradients(self, among: Container[int] | None = None, *, only_running: bool = False) -> None:
        """Note the gradients of all targets, or of those whose ids are `among` the given ones, before a step.

        They count once `confirm` says that the step was taken: mixed precision may skip it.

        Args:
            among: ids of parameters.
            only_running: whether only what is over all steps counts, since no update is due.
        """
        self.from_gradients.note(among, gradients.RUNNING if only_running else gradients.KINDS)

    @property
    def is_noted(self) -> bool:
        """Whether something is noted that was not taken over yet."""
        return self.from_gradients.is_noted

    def confirm(self) -> None:
        """Take over what was noted: the step was real."""
        self.from_gradients.confirm()

    @property
    def is_complete(self) -> bool:
        """Whether every gradient that was asked for has been seen."""
        return self.from_gradients.is_complete

    def clear(self) -> None:
        """Forget activations and gradients, but for the movement, which goes on."""
        self.from_gradients.clear()
        self._from_activations.clear()

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
            return local(parameter.detach()) if kind == "weight" else name
        if kind in gradients.KINDS:
            return self.from_gradients.read(kind, name)
        if kind == norm_scales.KIND:
            return self._from_norms.read(name)
        return self._from_activations.read(kind, name).to(parameter.device, torch.float32)

    def sums(self) -> dict[str, Any]:
        """Return all that was summed up so far, safe under `weights_only=True`: what calibration goes on from."""
        return {
            "gradients": self.from_gradients.state_dict(),
            "activations": self._from_activations.sums(),
            "norms": self._from_norms.sums(),
        }

    def load_sums(self, found: Mapping[str, Any]) -> None:
        """Go on from what `sums` returned."""
        self.from_gradients.load_state_dict(found["gradients"])
        self._from_activations.load_sums(found["activations"])
        self._from_norms.load_sums(found["norms"])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what outlives a checkpoint: the movement, and the gradients since the last update."""
        return self.from_gradients.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the movement, and the gradients since the last update."""
        self.from_gradients.load_state_dict(state)


def needs_loss(names: Sequence[str]) -> bool:
    """Whether a statistic among `names` is a gradient of the loss."""
    return any(name in gradients.KINDS and name != gradients.FLOW for name in names)
