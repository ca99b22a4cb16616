"""What has to hold of a small model, whoever made it: the comparison with an independent reference."""

from __future__ import annotations

import copy
import re
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo.example import Example
from benchmarks.zoo.masked import difference, outputs64, reference
from benchmarks.zoo.slices import tensors_of
from lightning_prune.graph import Plan
from lightning_prune.model.record import replay_

TOLERANCE = 1e-9  # float64, of the largest output; a chain of 14 pieces may lose some digits
VISIBLE = 1e-6
SMALLEST = (
    1e-12  # of outputs that are more than what rounding leaves of zeros, 1e-17 in float64 and 1e-8 in float32
)
CLEAR = re.compile(r"`[\w\[\].]+`|^.+: .+ cannot be pruned so\.$")
"""What an error of ours says: the name of what is wrong."""


class WrongError(Exception):
    """A promise that does not hold."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


def judged(dense: Example, small: Example, plan: Plan) -> dict[str, Any]:
    """Compare the small model with the reference in float64."""
    exact = copy.deepcopy(dense)
    exact.model.double()
    replay_(exact.model, [plan])  # factors are folded in without rounding
    expected = reference(dense, plan.slices) if not plan.replaced or plan.slices else skipping(dense, plan)
    error = difference(outputs64(exact), expected)
    check(error <= TOLERANCE, f"differs from the reference by {error:.1e}")
    held = [bool(t.abs().max() > SMALLEST) for t in expected]
    single = difference([t.double() for t in compress(small.outputs(), held)], list(compress(expected, held)))
    check(not any(held) or single <= 1e-2, f"in float32 it differs by {single:.1e}")
    for name, tensor in tensors_of(small.model).items():
        made = tensors_of(exact.model)[name]
        check(tensor.shape == made.shape, f"`{name}` has another shape where the plan is replayed")
    before, after = (sum(p.numel() for p in e.model.parameters()) for e in (dense, small))
    return {"error": error, "params": after / before}


def skipping(dense: Example, plan: Plan) -> list[Tensor]:
    """Return what the dense model computes with blocks left out: their input is handed on, or zeros like it."""
    left_out = copy.deepcopy(dense)
    for path, how in plan.replaced.items():
        block = left_out.model.get_submodule(path)

        def run(*args: Any, how: str = how, **kwargs: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            return x if how.startswith("skip") else torch.zeros_like(x)

        block.forward = run
    return outputs64(left_out)
