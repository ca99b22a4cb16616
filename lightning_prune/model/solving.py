"""A solver's part in pruning: what stays makes up for what goes, whether that is single weights or channels."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning_prune.core.types import Solver
from lightning_prune.model.calibration import Loss
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.layerwise import solve_
from lightning_prune.model.passes import Step
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.reconstruction import reconstruct_
from lightning_prune.model.unfinished import Unfinished
from lightning_prune.report.progress import steps


def make_up_(
    pruner: Pruner | GroupPruner,
    solver: Solver,
    batches: Iterable[Any],
    *,
    forward: Step | None = None,
    loss: Loss | None = None,
    blocks: str | None = None,
    unfinished: Unfinished | None = None,
) -> None:
    """Solve layer by layer for the weights that stay, in place, and mask what goes.

    Args:
        pruner: its choice is made, and nothing is masked yet.
        solver: weight, gram and mask -> the best values.
        batches: calibration data.
        forward: as for `calibrate`.
        loss: as for `calibrate`, for solvers of single weights by gradients.
        blocks: as for `solve_`.
        unfinished: of single weights, holds the layers that are solved.

    Raises:
        ValueError: no calibration data, or values that are not finite; channels and heads are then as they were.
    """
    progress = partial(steps, what=f"{type(solver).__name__}, layer by layer")
    if isinstance(pruner, Pruner):
        solve_(
            pruner,
            solver,
            batches,
            forward=forward,
            loss=loss,
            blocks=blocks,
            progress=progress,
            unfinished=unfinished,
        )
        pruner.apply_()
        return
    with ExitStack() as undo:
        reconstruct_(pruner, solver, batches, undo, forward=forward, blocks=blocks, progress=progress)
        undo.pop_all()
    pruner.mask_()
