"""Scores of all groups of a model, computed when they are read and not kept: a few rows of a weight at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_prune.core.granularities import Weight
from lightning_prune.core.types import BY_ROWS, Criterion, Granularity, LazyScores, Name, Shape, Stats

PIECE = 1 << 18  # weights scored at a time on CPU: their scores stay in the cache until they are read


def group_scores(
    stats: Mapping[Name, Stats],
    shapes: Mapping[Name, Shape],
    *,
    criterion: Criterion,
    granularity: Granularity,
) -> LazyScores:
    """Return the scores of all groups, computed when they are read.

    Args:
        stats: for each parameter what `criterion` asks for; it may be a lazy mapping as well.
        shapes: of the weights.
        criterion: statistics -> scores of weights.
        granularity: scores of weights -> scores of groups.

    Raises:
        ValueError: (when read) a criterion returns scores that do not have the shape of the weight.
    """

    def score(name: Name, found: Stats, shape: Shape) -> Tensor:
        scores: Tensor = criterion(**found)
        if tuple(scores.shape) != tuple(shape):
            raise ValueError(
                f"`criterion` returns scores of the weight's shape, {tuple(shape)} for `{name}`, "
                f"but got {tuple(scores.shape)} from {criterion}."
            )
        return granularity.reduce(scores.detach())

    def compute(name: Name) -> Tensor:
        return score(name, stats[name], shapes[name])

    def pieces(name: Name) -> Iterator[Tensor]:
        found = dict(stats[name]) if is_by_rows else {}
        height = num_rows(found, shapes[name])
        if not height:
            yield compute(name)
            return
        for start in range(0, shapes[name][0], height):
            rows = {kind: value[start : start + height] for kind, value in found.items()}
            yield score(name, rows, (min(height, shapes[name][0] - start), *shapes[name][1:]))

    is_by_rows = all(getattr(noun, BY_ROWS, False) for noun in (criterion, granularity))
    return LazyScores(group_shapes(shapes, granularity), compute, pieces=pieces)


def num_rows(stats: Stats, shape: Shape) -> int:
    """Return how many rows of a weight are scored at a time; 0 where it is scored as a whole.

    That is where it is small, or where something that is known of it is no tensor of its shape on CPU. Large tensors
    that come and go cost more than what is computed: each time the system has to find and clear their memory.
    """
    height = max(1, PIECE // max(1, math.prod(shape[1:])))
    is_plain = all(
        isinstance(found, Tensor) and found.shape == tuple(shape) and found.device.type == "cpu"
        for found in stats.values()
    )
    return height if stats and is_plain and shape and shape[0] > height else 0


def group_shapes(shapes: Mapping[Name, Shape], granularity: Granularity) -> dict[Name, Shape]:
    """Return the shape of each parameter's group scores; nothing is computed."""
    return {
        n: tuple(granularity.reduce(torch.empty(shape, device="meta")).shape) for n, shape in shapes.items()
    }


def without_pruned(scores: LazyScores, masks: Mapping[Name, Tensor], granularity: Granularity) -> LazyScores:
    """Rank groups that `masks` have removed below all others, so that what is pruned stays pruned."""

    def left(name: Name) -> Tensor:
        return masks[name] if granularity == Weight() else granularity.reduce(masks[name].float()) != 0

    def compute(name: Name) -> Tensor:
        found = scores[name]
        return found if name not in masks else found.masked_fill(~left(name), -math.inf)

    def pieces(name: Name) -> Iterator[Tensor]:
        flat, place = left(name).reshape(-1) if name in masks else None, 0
        for found in scores.pieces(name):
            if flat is None:
                yield found
            else:
                here = flat[place : place + found.numel()].view(found.shape)
                yield found.masked_fill(~here, -math.inf)
                place += found.numel()

    return LazyScores(scores.shapes, compute, scores.across, pieces)
