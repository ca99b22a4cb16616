"""How good is each weight: the statistics of one parameter -> one score per weight; higher is kept.

The keyword-only arguments of a criterion declare the statistics that it needs, and nothing else is collected;
files are grouped by what that costs: `weights` (nothing), `gradients` (a backward pass), `curvature` (several),
`activations` (hooks on forward passes). Scores have the shape of the weight; granularities sum them up where groups
are pruned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning_prune.core.checks import check_noun

DATA_FREE = {"name", "weight"}
"""Statistics that are there before any data has been seen."""
ONLY_IN_TRAINING = ("movement",)
ONLY_FROM_BATCHES = ("hessian_diagonal", "hessian_gradient", "flow_gradient")
"""Statistics that training does not come by: they take passes of their own over calibration batches."""


def required_statistics(criterion: Callable[..., Any]) -> tuple[str, ...]:
    """Return the statistics that a criterion asks for: the names of its keyword-only arguments.

    Raises:
        ValueError: it is no object that can be called, or takes arguments in another way, or none.

    Example:
        >>> from lightning_prune.core.criteria.activations import Wanda
        >>> required_statistics(Wanda())
        ('weight', 'input_norm')
    """
    check_noun("criterion", criterion, "Magnitude()", "__call__")
    parameters = inspect.signature(criterion).parameters.values()
    if not parameters or any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters):
        raise ValueError(
            "`criterion` takes its statistics as keyword-only arguments, (*, weight, ...), but got "
            f"{criterion!r} with {inspect.signature(criterion)}."
        )
    return tuple(p.name for p in parameters)


def check_can_train(criterion: Callable[..., Any]) -> None:
    """Refuse a criterion whose statistics a run that trains does not come by.

    Raises:
        ValueError: it takes passes of its own over calibration batches.
    """
    if set(required_statistics(criterion)) & set(ONLY_FROM_BATCHES):
        raise ValueError(
            f"`criterion` reads what training shows, but got {criterion}, which takes passes of its own over "
            "calibration batches: use InitialPruning or PostTrainingPruning."
        )


def check_can_calibrate(criterion: Callable[..., Any]) -> None:
    """Refuse a criterion whose statistics calibration batches do not show.

    Raises:
        ValueError: it sums over training.
    """
    if set(required_statistics(criterion)) & set(ONLY_IN_TRAINING):
        raise ValueError(
            f"`criterion` reads calibration batches, but got {criterion}, a sum over training: use TrainTimePruning."
        )
