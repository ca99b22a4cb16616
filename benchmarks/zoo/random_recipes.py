"""Random recipes for structured pruning; not all of them fit all networks."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.example import Example, tensors_in
from benchmarks.zoo.pieces import coin
from lightning_prune import (
    ERK,
    LAMP,
    OWL,
    APoZ,
    Budget,
    Channel,
    Fixed,
    GeometricMedian,
    Global,
    Head,
    Isomorphic,
    Layer,
    Local,
    Magnitude,
    MeanActivation,
    NofM,
    PerRow,
    Saliency,
    Taylor,
    Wanda,
)
from lightning_prune import (
    Random as RandomScores,
)


def recipe(draw: Random, example: Example) -> dict[str, Any]:
    """Draw the arguments of `shrink`; not all of them fit all networks."""
    found: dict[str, Any] = {"granularity": granularity(draw), "scope": scope(draw), "criterion": Magnitude()}
    if isinstance(found["granularity"], Layer) and coin(draw, 0.9):
        found["scope"] = Global()
    if coin(draw, 0.3):
        kind = draw.choice(["params", "macs", "num_bytes"])
        found["budget"] = Budget(**{kind: draw.uniform(0.15, 0.95)}, tolerance=draw.choice([0.02, 0.1, 0.3]))
    elif not isinstance(found["scope"], (NofM, Fixed)):
        found["sparsity"] = draw.choice([0.5, draw.uniform(0.05, 0.95)])
    if coin(draw, 0.4):
        found |= criterion(draw, example)
    names = [name for name, p in example.model.named_parameters() if p.dim() > 1]
    kinds = [
        type(m)
        for m in example.model.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
    ]
    for argument in ("include", "exclude"):
        if coin(draw, 0.08):
            found[argument] = [draw.choice([*names, *kinds, "steps.0", "steps.1*", "nothing"])]
    return found


def granularity(draw: Random) -> Any:
    reduction, normalize = draw.choice(["mean", "sum", "max"]), draw.choice(["mean", "max", "none"])
    least = draw.choice([1, 1, 2, 0.3, 0])
    if coin(draw, 0.08):
        return Head(reduction, normalize, least)
    if coin(draw, 0.06):
        return Layer(draw.choice(["block", "branch"]))
    return Channel(
        reduction, normalize, draw.choice([1, 1, 2, 8]), least, draw.choice(["dim", "dim", "whole", "keep"])
    )


def scope(draw: Random) -> Any:
    least = draw.choice([1, 0, 2, 0.2])
    usual = [Global(least), Local(least), Isomorphic(least)]
    if coin(draw, 0.9):
        return draw.choice(usual)
    return draw.choice([LAMP(), LAMP(), ERK(), ERK(), OWL(), OWL(), PerRow(), NofM(), Fixed({"*": 0.5})])


def criterion(draw: Random, example: Example) -> dict[str, Any]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return torch.stack([t.float().pow(2).mean() for t in tensors_in(model(*batch))]).sum()

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(*batch)

    example.model.zero_grad()
    loss(example.model, example.args).backward()
    is_reached = all(p.grad is not None for p in example.model.parameters())
    example.model.zero_grad()
    known = [Magnitude(2.0), RandomScores(3), GeometricMedian()]
    known += (
        [Saliency(), Taylor(), Wanda(), APoZ(), MeanActivation()] if is_reached or coin(draw, 0.1) else []
    )
    made = draw.choice(known)
    return {"criterion": made, "batches": [example.args], "loss": loss, "forward": forward}
