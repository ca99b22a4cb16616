"""Pieces that read two tensors of one shape, or of shapes that can be joined."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import nn

from benchmarks.zoo.pieces import WIDTHS, Code, Shape, coin, divisors, parameter

Pair = Callable[[Random, Shape], nn.Module]


def added(draw: Random, shape: Shape) -> nn.Module:
    kinds = [
        lambda: Code(lambda _, a, b: a + b),
        lambda: Code(lambda _, a, b: (a + b).relu()),
        lambda: Code(lambda _, a, b: a - 0.5 * b),
        lambda: Code(lambda m, a, b: a + m.share * b, share=parameter(1)),
        lambda: Code(lambda _, a, b: a.clone().add_(b)),
        lambda: Code(lambda _, a, b: torch.lerp(a, b, 0.3)),
        lambda: Code(lambda _, a, b: sum([a, b, a])),
        lambda: Code(lambda _, a, b: torch.stack([a, b]).mean(0)),
    ]
    return draw.choice(kinds)()


def multiplied(draw: Random, shape: Shape) -> nn.Module:
    kinds = [
        lambda: Code(lambda _, a, b: a * b),
        lambda: Code(lambda _, a, b: a * b.sigmoid()),
        lambda: Code(lambda _, a, b: torch.maximum(a, b)),
        lambda: Code(lambda _, a, b: torch.where(a > b, a, b.tanh())),
        lambda: Code(lambda _, a, b: a / (b.abs() + 1)),
        lambda: Code(lambda _, a, b: torch.addcmul(a, a, b)),
    ]
    return draw.choice(kinds)()


def concatenated(draw: Random, shape: Shape) -> nn.Module:
    d = -1 if len(shape) == 2 else 1
    if coin(draw):
        return Code(lambda _, a, b: torch.cat([a, b], d))
    return Code(lambda _, a, b: torch.cat([b, a.relu(), b], d))


def attended(draw: Random, shape: Shape) -> nn.Module:
    """Let a sequence look at another one, or pictures and vectors be added."""
    if len(shape) != 2:
        return added(draw, shape)
    width = shape[1]
    if coin(draw):
        inner = nn.MultiheadAttention(width, draw.choice(divisors(width)), batch_first=True)
        return Code(lambda m, a, b: a + m.inner(a, b, b)[0], inner=inner)
    layers = {n: nn.Linear(width, draw.choice(WIDTHS)) for n in "v"}
    return Code(lambda m, a, b: (a @ b.transpose(1, 2)).softmax(-1) @ m.v(b), **layers)


PAIRS: list[Pair] = [added, added, added, multiplied, concatenated, concatenated, attended]
