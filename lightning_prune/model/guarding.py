"""What keeps a layer from dying: masks that are held, and what updates have removed since all was well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_prune.core.allocation import num_kept
from lightning_prune.core.masks import pack, sparsity_of, unpack
from lightning_prune.core.types import Masks, Name


class Guard:
    """The memory of a pruner that is watched.

    Args:
        min_density: of the weights of a layer, below which an update of its mask is not made, in [0, 1).
    """

    def __init__(self, min_density: float) -> None:
        self.min_density = min_density
        self.held: Masks = {}
        """The masks of protected layers, which keep as many weights as they have."""
        self.before: Masks = {}
        self.requested = 0.0
        self.removed: list[tuple[Name, torch.Tensor, torch.Tensor]] = []
        """Of each update since `mark`: name, places and values of the weights that it has removed."""
        self.news: list[tuple[Name, float]] = []
        """Layers that were about to die, and the density that they were to have."""

    def mark(self, masks: Masks, requested: float) -> None:
        """Remember a moment at which all is well."""
        self.before, self.requested, self.removed = dict(masks), requested, []

    def protect(self, names: list[Name], masks: Masks, targets: Mapping[Name, nn.Parameter]) -> None:
        """Hold layers at their masks, or whole where there is none yet."""
        for name in names:
            whole = torch.ones_like(targets[name], dtype=torch.bool)
            self.held[name] = masks.get(name, whole)

    def follow(self, masks: Masks) -> None:
        """Hold protected layers at the places that their weights have come to."""
        self.held = {name: masks[name] for name in self.held}

    def dying(self, masks: Masks) -> list[Name]:
        """Return the layers whose new masks would leave too little, and remember them as news."""
        densities = {name: 1.0 - sparsity_of({name: mask}) for name, mask in masks.items()}
        found = [n for n, density in densities.items() if density < self.min_density and n not in self.held]
        self.news += [(name, densities[name]) for name in found]
        return found

    def note(self, before: Masks, after: Masks, targets: Mapping[Name, nn.Parameter]) -> None:
        """Remember the weights that an update is about to remove."""
        for name, mask in after.items():
            gone = ~mask if name not in before else before[name] & ~mask
            places = gone.flatten().nonzero().flatten()
            if len(places):
                self.removed.append((name, places, targets[name].detach().flatten()[places]))

    def suspect(self, before: Masks, after: Masks) -> Name:
        """Return the layer that has lost most of what it had, of those that lost alike the one with the fewest left."""

        def left(name: Name) -> tuple[float, int]:
            count = int(after[name].sum())
            had = int(before[name].sum()) if name in before else after[name].numel()
            return round(count / max(had, 1), 1), count

        return min((name for name in after if name not in self.held), key=left)

    @torch.no_grad()
    def undo_(self, targets: Mapping[Name, nn.Parameter]) -> Masks:
        """Put back what was removed since the mark, and return the masks of that moment."""
        for name, places, values in reversed(self.removed):
            flat = targets[name].detach().flatten()
            flat[places] = values
            targets[name].copy_(flat.view_as(targets[name]))
        self.removed = []
        return dict(self.before)

    def share(self, shape_sizes: Mapping[Name, int], held: int, sparsity: float) -> float:
        """Return the sparsity of the other layers that makes up for what the protected ones keep.

        Args:
            shape_sizes: groups of every layer.
            held: groups that the protected layers keep.
            sparsity: of all together.
        """
        rest = sum(size for name, size in shape_sizes.items() if name not in self.held)
        left = num_kept(sum(shape_sizes.values()), sparsity) - held
        return min(max(1.0 - left / rest, 0.0), 1.0 - self.min_density)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, safe under `torch.load(weights_only=True)`."""
        return {
            "held": {name: pack(mask) for name, mask in self.held.items()},
            "before": {name: pack(mask) for name, mask in self.before.items()},
            "requested": self.requested,
            "removed": list(self.removed),
        }

    def load_state_dict(self, state: Mapping[str, Any], targets: Mapping[Name, nn.Parameter]) -> None:
        """Restore what `state_dict` returned."""

        def restored(packed: Mapping[str, Any]) -> Masks:
            return {name: unpack(name, mask).to(targets[name].device) for name, mask in packed.items()}

        self.held, self.before = restored(state["held"]), restored(state["before"])
        self.requested = float(state["requested"])
        self.removed = [
            (n, places.to(targets[n].device), values.to(targets[n].device))
            for n, places, values in state["removed"]
        ]
