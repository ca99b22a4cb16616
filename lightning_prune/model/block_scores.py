"""From scores of weights to one score for each block or branch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lightning_prune.core.patterns import listed
from lightning_prune.core.types import Name, Scores
from lightning_prune.model.grouping import one_of_each
from lightning_prune.model.targets import check_values, select_targets


def scored_in(model: nn.Module, paths: Iterable[str]) -> dict[Name, nn.Parameter]:
    """Return the weights of linear, convolution and attention layers in some blocks, by which they are ranked.

    Raises:
        ValueError: a block has none, or one without values of its own.
    """
    targets = select_targets(model)
    found: dict[Name, nn.Parameter] = {}
    for path in paths:
        inside = {name: weight for name, weight in targets.items() if name.startswith(f"{path}.")}
        if not inside:
            raise ValueError(
                f"`criterion` ranks blocks by the weights of their linear, convolution and attention layers, but got "
                f"{path} without: exclude it, or leave out `criterion`, to rank by influence."
            )
        found |= inside
    check_values(found)
    return found


def score_blocks(
    paths: Iterable[str],
    scores: Scores,
    reduction: str = "mean",
    dims: Mapping[Name, Collection[int]] | None = None,
) -> dict[str, float]:
    """Reduce the scores of all weights in a block to one.

    Args:
        paths: of blocks.
        scores: of weights; each tensor is read once.
        reduction: "mean", which favours no large block, "sum" or "max".
        dims: along which the outputs of weights lie, where all weights of an output have the same score, which counts
            once; by default each weight counts.

    Returns:
        Path -> score, higher is kept.

    Raises:
        ValueError: a score is not finite.

    Example:
        >>> import torch
        >>> scores = {"a.weight": torch.tensor([1.0, 3.0]), "b.weight": torch.tensor([4.0])}
        >>> score_blocks(["a", "b"], scores), score_blocks(["a", "b"], scores, "sum")
        ({'a': 2.0, 'b': 4.0}, {'a': 4.0, 'b': 4.0})
    """
    total = dict.fromkeys(paths, 0.0)
    count, largest = dict.fromkeys(total, 0), dict.fromkeys(total, -math.inf)
    for name, weights in scores.items():
        path = next(path for path in total if name.startswith(f"{path}."))
        found = weights if dims is None else one_of_each(weights, min(dims[name]))
        total[path] += float(found.double().sum())
        largest[path] = max(largest[path], float(found.max()))
        count[path] += found.numel()
    reduced = {p: {"mean": total[p] / count[p], "sum": total[p], "max": largest[p]}[reduction] for p in total}
    if bad := [path for path, score in reduced.items() if not math.isfinite(score)]:
        raise ValueError(f"`criterion` gives weights finite scores, but got others in {listed(bad)}.")
    return reduced
