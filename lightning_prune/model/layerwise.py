"""Solvers at work: layers are pruned one after the other, each on what the pruned ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_prune.core.granularities import Weight
from lightning_prune.core.masks import pack, unpack
from lightning_prune.core.quotas import Quota
from lightning_prune.core.solvers import needs_of
from lightning_prune.core.types import Name, Solver
from lightning_prune.model.calibration import Loss, call_model, evaluating, gradients_by_batch
from lightning_prune.model.matrices import Grams, Matrix, matrix_of
from lightning_prune.model.passes import Step
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.stages import stages_of
from lightning_prune.model.unfinished import Unfinished

T = TypeVar("T")
Progress = Callable[[Iterable[T]], Iterable[T]]


def check_solver(solver: Solver, pruner: Pruner) -> dict[Name, Matrix]:
    """Return the matrices of a pruner's targets.

    Raises:
        ValueError: a layer that no solver knows, or a solver that chooses single weights for another granularity.
    """
    if "quota" in needs_of(solver) and pruner.granularity != Weight():
        raise ValueError(
            f"`solver` {solver} chooses single weights, but got {pruner.granularity}: use LeastSquares."
        )
    return {name: matrix_of(pruner.model, name, parameter) for name, parameter in pruner.targets.items()}


@torch.no_grad()
def solve_(
    pruner: Pruner,
    solver: Solver,
    batches: Iterable[Any] | None,
    *,
    forward: Step | None = None,
    loss: Loss | None = None,
    blocks: str | None = None,
    progress: Progress[Any] = iter,
    unfinished: Unfinished | None = None,
) -> None:
    """Prune each target by a solver, in place, in the order in which they run; the pruner's masks follow.

    The memory is that of one layer's or one block's Gram matrices (in x in float64 each) and of the activations between
    two blocks, whatever the depth; for a solver by gradients it is that of one layer's gradients, one for each batch.
    What is done when a layer cannot be solved stays done.

    Args:
        pruner: its masks are chosen, and not applied yet.
        solver: weight, gram and what else it asks for -> new weight and mask.
        batches: calibration data.
        forward: as for `calibrate`.
        loss: as for `calibrate`, for solvers by gradients.
        blocks: path of the module that holds the blocks; by default the longest chain that is found.
        progress: stages -> the same, shown as they go by.
        unfinished: holds layers of before, which are taken over, and each when it is solved.

    Raises:
        ValueError: no calibration data, no loss where gradients are asked for, a layer that does not run, or inputs or
            gradients that are not finite.
    """
    matrices, data = check_solver(solver, pruner), list(batches or ())
    if not data:
        raise ValueError("`batches` is calibration data, which a solver needs, but got none.")
    if "gradients" in needs_of(solver):
        if loss is None:
            raise ValueError(
                "`loss` is a function (model, batch) -> scalar, which the solver needs, but got None."
            )
        for name in progress(list(matrices)):
            if not _is_taken_over_(pruner, unfinished, (name,)):
                found = gradients_by_batch(pruner.model, pruner.targets[name], data, loss)
                _solve_one_(pruner, solver, name, matrices[name], gradients=found)
                _write_down(pruner, unfinished, (name,))
        return
    with evaluating(pruner.model):
        for stage in progress(stages_of(pruner.model, matrices, data, forward or call_model, blocks)):
            if not _is_taken_over_(pruner, unfinished, stage.names):
                grams = Grams({name: matrices[name] for name in stage.names})
                with grams.watch():
                    stage.run()
                for name in stage.names:
                    _solve_one_(pruner, solver, name, matrices[name], gram=grams.read(name))
                _write_down(pruner, unfinished, stage.names)
            stage.leave()


def _is_taken_over_(pruner: Pruner, unfinished: Unfinished | None, names: Sequence[Name]) -> bool:
    """Put layers that were solved before in their place, if all of them were."""
    if unfinished is None or not all(unfinished.has(_part(name)) for name in names):
        return False
    for name in names:
        found, parameter = unfinished.read(_part(name)), pruner.targets[name]
        parameter.copy_(found["weight"])
        pruner.masks[name] = unpack(name, found["mask"]).to(parameter.device)
    return True


def _write_down(pruner: Pruner, unfinished: Unfinished | None, names: Sequence[Name]) -> None:
    if unfinished is None:
        return
    for name in names:
        weight = pruner.targets[name].detach().cpu().clone()
        unfinished.write(_part(name), {"weight": weight, "mask": pack(pruner.masks[name])})


def _part(name: Name) -> str:
    return f"layer {name}"


def _solve_one_(
    pruner: Pruner,
    solver: Solver,
    name: Name,
    matrix: Matrix,
    *,
    gram: Tensor | None = None,
    gradients: Tensor | None = None,
) -> None:
    """Solve for one layer by what its inputs or its gradients say."""
    if gradients is not None and not bool(gradients.isfinite().all()):
        raise ValueError(f"`{name}` has gradients that are infinite or NaN on calibration data.")
    parameter = pruner.targets[name]
    weight = matrix.to_matrix(parameter.detach().float())
    mask = matrix.to_matrix(pruner.masks[name]) if name in pruner.masks else torch.ones_like(weight).bool()
    quota = Quota(pruner.recipe.scope, int(mask.sum()), (weight.shape[0], weight.shape[1]))
    offered: dict[str, Any] = {"weight": weight, "gram": gram, "mask": mask, "quota": quota}
    if gradients is not None:
        offered["gradients"] = torch.stack([matrix.to_matrix(gradient) for gradient in gradients])
    new, kept = solver(**{key: offered[key] for key in needs_of(solver)})
    parameter.copy_(matrix.to_weight(new))
    pruner.masks[name] = matrix.to_weight(kept).contiguous()
