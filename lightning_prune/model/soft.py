"""Soft masks: the network reads masked weights, and the weights behind them live on until masks are settled.

A parameter holds what the network reads, zeros included, so that checkpoints, averages and whatever else looks at the
model see plain masked weights under plain names. For the length of an optimizer's step it holds the weights behind:
`wake_` puts them there, `apply_` takes them back and masks the parameter again.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import Masking, Masks, Name
from lightning_prune.graph import Plan
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shards import local
from lightning_prune.model.surgery import sliced


class SoftPruner(Pruner):
    """The masks of one model under one recipe, whose pruned weights may come back.

    Args:
        model: as for `Pruner`.
        recipe: what is pruned, and how much of it in the end.
        masking: the gradient of the weights behind the masks.
        trained: as for `Pruner`.

    Raises:
        ValueError: the recipe does not fit the model.
    """

    can_compact = False

    def __init__(
        self, model: nn.Module, recipe: Recipe, masking: Masking, trained: Container[int] | None = None
    ) -> None:
        super().__init__(model, recipe, trained)
        self.masking = masking
        self.behind: dict[Name, Tensor] = {}
        """The weights behind the masks; empty before the first update and once masks are settled."""
        self.is_last = False
        """Whether the next update settles the masks."""
        self._awake: set[Name] = set()

    @property
    def settled(self) -> Masks:
        """The masks, once no weight lives on behind them."""
        return {} if self.behind else self.masks

    @torch.no_grad()
    def wake_(self, among: Container[int] | None = None) -> None:
        """Let parameters hold the weights behind their masks, all of them or those whose ids are `among` the given."""
        names = [name for name in self._among(among) if name not in self._awake]
        _copy_([local(self.targets[name]) for name in names], [self.behind[name] for name in names])
        self._awake.update(names)

    @torch.no_grad()
    def turn_gradients_(self, among: Container[int] | None = None) -> None:
        """Make the gradients of what the network has read those of the weights behind."""
        for name in self._among(among):
            if (own := self.targets[name].grad) is not None and name in self.masks:
                grad = local(own)
                turned = self.masking.gradient(weight=self.behind[name], grad=grad, mask=self.masks[name])
                if turned is not grad:
                    grad.copy_(turned)

    @torch.no_grad()
    def apply_(self, among: Container[int] | None = None) -> None:
        """Keep what a step has made of the weights that are awake, and mask the parameters."""
        names = [name for name in self._among(among) if name in self._awake]
        _copy_([self.behind[name] for name in names], [local(self.targets[name]) for name in names])
        self._awake.difference_update(names)
        super().apply_(among)

    def choose_(self, fraction: float) -> None:
        """Let all weights compete anew, by the values that they have behind the masks."""
        for name, parameter in self.targets.items():
            if name not in self.behind:
                self.behind[name] = local(parameter.detach()).clone()
        self.wake_()
        self.forget()
        super().choose_(fraction)

    def update_(self, fraction: float) -> None:
        """Compute new masks and apply them; the last time, for good."""
        super().update_(fraction)
        if self.is_last:
            self.behind.clear()

    def follow_(self, plan: Plan) -> None:
        """Go on with the smaller model; the weights behind the masks are cut alike, too."""
        super().follow_(plan)
        self.behind = {name: sliced(w, plan.slices.get(name, {})) for name, w in self.behind.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return masks, progress, sums and the weights behind, safe under `torch.load(weights_only=True)`."""
        behind = {name: self.shards.whole(name, weight) for name, weight in self.behind.items()}
        return super().state_dict() | {"behind": behind}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or leave all as it is."""
        super().load_state_dict(state)
        behind: Mapping[Name, Tensor] = state.get("behind", {})
        copies = {n: w.to(self.targets[n].device, copy=True) for n, w in behind.items()}
        self.behind = {name: self.shards.part(name, copied) for name, copied in copies.items()}
        self._awake = set()

    def _among(self, ids: Container[int] | None) -> list[Name]:
        return [name for name in self.behind if ids is None or id(self.targets[name]) in ids]


def check_steps(optimizers: list[Optimizer]) -> None:
    """Refuse optimizers that ask for the loss several times a step, when weights are no longer masked.

    Raises:
        ValueError: LBFGS.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "`masking` needs an optimizer that reads one gradient a step, such as SGD or AdamW, but got LBFGS."
            )


def _copy_(targets: list[Any], sources: list[Any]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
