"""Pruning in rounds: a little, then the statistics of what is left, and so on until the target is reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from lightning_prune.core.schedules import Exponential
from lightning_prune.model.calibration import CALIBRATION
from lightning_prune.model.unfinished import Unfinished
from lightning_prune.report.progress import steps

if TYPE_CHECKING:
    from lightning_prune.model.shrinking import AnyPruner

ROUNDS = "rounds"


def round_fractions(sparsity: float, num_rounds: int) -> list[float]:
    """Return the fraction of `sparsity` that each round ends at, so that density falls by the same factor in each.

    After round k of n the density is (1 - sparsity)^(k / n): Tanaka et al. 2020 (arXiv:2006.05467), algorithm 1.

    Example:
        >>> [round(0.75 * fraction, 4) for fraction in round_fractions(0.75, num_rounds=2)]
        [0.5, 0.75]
    """
    if sparsity == 0.0:
        return [1.0] * num_rounds
    curve = Exponential(steepness=-math.log1p(-sparsity))
    return [curve(k / num_rounds) for k in range(1, num_rounds + 1)]


@torch.no_grad()
def prune_in_rounds_(
    pruner: AnyPruner,
    num_rounds: int,
    measure: Callable[[], None],
    *,
    revive: bool = False,
    update_: Callable[[float], None] | None = None,
    unfinished: Unfinished | None = None,
) -> None:
    """Prune to the final sparsity in rounds, each of which measures the model that the one before has left.

    Args:
        pruner: of the model, which is changed in place.
        num_rounds: at least 1.
        measure: reads the pruner's statistics, off the masked model.
        revive: whether what a round has pruned may come back in a later one, with its weight: FORCE, de Jorge et al.
            2020 (arXiv:2006.09081), algorithm 1, which scores the weight as it was by the gradient without it.
        update_: does the last update; by default the pruner's own.
        unfinished: holds the rounds of before, and those that are done when it is interrupted.
    """
    dense = {name: p.detach().clone() for name, p in pruner.targets.items()} if revive else {}
    *early, last = round_fractions(pruner.final_sparsity, num_rounds)
    rounds = [*((fraction, pruner.update_) for fraction in early), (last, update_ or pruner.update_)]
    num_done = _taken_over_(pruner, unfinished)
    rest = rounds[num_done:]
    with unfinished.whole_steps() if unfinished is not None else nullcontext():
        for number, (fraction, update) in enumerate(steps(rest, "rounds") if early else rest, num_done + 1):
            with torch.enable_grad():
                measure()
            if revive:
                for name, weight in dense.items():
                    pruner.targets[name].copy_(weight)
                pruner.forget()
            update(fraction)
            if unfinished is not None and number < num_rounds:
                unfinished.drop(CALIBRATION)
                unfinished.hold(ROUNDS, {"num_done": number, "pruner": pruner.state_dict()}.copy)
                unfinished.reached()


def _taken_over_(pruner: AnyPruner, unfinished: Unfinished | None) -> int:
    """Put the pruner where an earlier try has got to, and return how many rounds that were."""
    if unfinished is None or not unfinished.has(ROUNDS):
        return 0
    found = unfinished.read(ROUNDS)
    pruner.load_state_dict(found["pruner"])
    pruner.apply_()
    unfinished.hold(ROUNDS, found.copy)
    return int(found["num_done"])
