"""Weights that lie as (in, out): scopes that speak of outputs and inputs see them as (out, in)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial

from torch import Tensor, nn

from lightning_prune.core.types import (
    LazyScores,
    Masks,
    Name,
    Scope,
    Scores,
    Shape,
    across_of,
    pieces_of,
    shapes_of,
)
from lightning_prune.model.activations import owners_of
from lightning_prune.model.layouts import is_transformers_conv1d


def turned_in(model: nn.Module, targets: Mapping[Name, nn.Parameter]) -> frozenset[Name]:
    """Return the targets that lie as (in, out), as those of GPT-2 in Hugging Face transformers do."""
    kinds = {name: [owner for owner, _ in owners_of(model, parameter)] for name, parameter in targets.items()}
    return frozenset(n for n, owners in kinds.items() if owners and all(map(is_transformers_conv1d, owners)))


class Oriented:
    """A scope that sees all weights as (out, in).

    Args:
        scope: what it stands for.
        turned: names of the weights that lie the other way.
    """

    def __init__(self, scope: Scope, turned: Collection[Name]) -> None:
        self.scope, self.turned = scope, turned

    def __call__(self, scores: Scores, sparsity: float) -> Masks:
        """Return the masks of the scope, each as its weight lies."""
        shapes, across = self.shapes(shapes_of(scores)), across_of(scores)
        seen = LazyScores(
            shapes, lambda name: self.turn(name, scores[name]), across, partial(self._pieces, scores)
        )
        masks = self.scope(seen, sparsity)
        return {name: self.turn(name, mask).contiguous() for name, mask in masks.items()}

    def _pieces(self, scores: Scores, name: Name) -> Iterable[Tensor]:
        return (self.turn(name, scores[name]),) if name in self.turned else pieces_of(scores, name)

    def turn(self, name: Name, tensor: Tensor) -> Tensor:
        """Return a tensor of a weight's shape the other way round, where the weight lies so."""
        return tensor.transpose(0, 1) if name in self.turned else tensor

    def shapes(self, shapes: Mapping[Name, Shape]) -> dict[Name, Shape]:
        """Return the shapes that the scope sees."""
        return {n: (s[1], s[0], *s[2:]) if n in self.turned else s for n, s in shapes.items()}
