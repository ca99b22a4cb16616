"""How the weights that stay make up for those that go, one layer at a time.

`surgery` and `combinatorial` solve min ||W X - W' X||^2 over sparse W', X being the inputs of the layer on calibration
data; `curvature` goes by the gradients of the loss. A solver's keyword-only arguments declare its needs: `weight`, the
matrix (out, in); `gram`, X X^T (in, in), summed over all positions, or `gradients` of the loss, one for each batch
(N, out, in); and either `mask`, the weights that criterion and scope keep, or `quota`, how many weights the scope keeps
where, so that the solver chooses which.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.core.types import Solver

CHUNK = 1 << 22  # entries of the systems that are solved at once


def needs_of(solver: Solver) -> tuple[str, ...]:
    """Return what a solver asks for: the names of its arguments.

    Example:
        >>> from lightning_prune import SparseGPT
        >>> needs_of(SparseGPT())
        ('weight', 'gram', 'quota')
    """
    return tuple(inspect.signature(solver).parameters)


def best_values(weight: Tensor, quadratic: Tensor, mask: Tensor) -> Tensor:
    """Return the w' that are zero outside of `mask` and minimise (w - w')^T Q (w - w'), for each row of weights.

    With kept places S it is w'_S = (Q_SS)^-1 (Q w)_S.

    Args:
        weight: (R, C).
        quadratic: Q, positive definite, (C, C) for all rows or (R, C, C).
        mask: (R, C), True is kept.
    """
    import torch

    wide, is_shared = weight.to(quadratic.dtype), quadratic.dim() == 2
    goals = wide @ quadratic if is_shared else (quadratic @ wide[..., None])[..., 0]
    solved, size = torch.zeros_like(goals), max(1, CHUNK // quadratic.shape[-1] ** 2)
    if is_shared and bool((mask == mask[:1]).all()):  # whole inputs go: one system for all rows
        kept = mask[0]
        solved[:, kept] = torch.linalg.solve(quadratic[kept][:, kept], goals[:, kept].t()).t()
        return solved.to(weight.dtype)
    for rows in torch.arange(len(weight), device=weight.device).split(size):
        kept = mask[rows].to(quadratic.dtype)
        own = quadratic if is_shared else quadratic[rows]
        systems = own * kept[:, :, None] * kept[:, None, :] + torch.diag_embed(1.0 - kept)
        solved[rows] = torch.linalg.solve(systems, goals[rows] * kept)
    return (solved * mask).to(weight.dtype)


def damped(quadratic: Any, damping: float) -> Any:
    """Return matrices (..., C, C) that can be inverted; a place that is never on counts as one that is on by itself.

    Args:
        quadratic: positive semidefinite.
        damping: what is added to the diagonal, as a fraction of its mean.
    """
    diagonal = quadratic.diagonal(dim1=-2, dim2=-1)
    added = damping * diagonal.mean(-1, keepdim=True) + (diagonal == 0).to(quadratic.dtype)
    return quadratic + added.clamp_min(1e-30).diag_embed()
