"""The pieces of random networks, by what they read: pictures, sequences, vectors, or two tensors.

A piece is a function (draw, shape) -> module, or None where it does not fit the shape, which is that of one example:
(channels, height, width), (length, width) or (width,). What the module returns is seen by running it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Shape: TypeAlias = tuple[int, ...]
Make: TypeAlias = Callable[[Random, Shape], "nn.Module | None"]
WIDTHS = (2, 3, 4, 5, 6, 8, 8, 12, 16)


class Code(nn.Module):
    """Layers and numbers by name, and a function of them that is the forward pass."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def coin(draw: Random, chance: float = 0.5) -> bool:
    return draw.random() < chance


def activation(draw: Random, width: int) -> nn.Module:
    """Return a function of each entry; some are not 0 at 0, and some have a weight for each channel."""
    plain = [
        nn.ReLU,
        nn.ReLU,
        nn.GELU,
        nn.SiLU,
        nn.Tanh,
        nn.Sigmoid,
        nn.Softplus,
        nn.Hardswish,
        nn.ELU,
        nn.Mish,
    ]
    kinds: list[Callable[[], nn.Module]] = [
        *plain,
        *(nn.LeakyReLU, nn.Hardtanh, nn.Dropout, nn.Identity, nn.PReLU),
        lambda: nn.PReLU(width),
        lambda: Code(lambda _, x: x.exp() / (1 + x.exp())),
        lambda: Code(lambda _, x: torch.where(x > 0, x, 0.1 * x)),
        lambda: Code(lambda _, x: x.masked_fill(x < -1, 0.5)),
        lambda: Code(lambda _, x: x.cos()),
    ]
    return draw.choice(kinds)()
