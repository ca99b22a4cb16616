"""Pieces that read vectors, (batch, width)."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.zoo.pieces import WIDTHS, Code, Make, Shape, activation, coin, divisors, parameter


def linear(draw: Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[0], draw.choice(WIDTHS), bias=coin(draw, 0.7))


def normed(draw: Random, shape: Shape) -> nn.Module:
    width = shape[0]
    kinds = [
        lambda: nn.BatchNorm1d(width),
        lambda: nn.LayerNorm(width),
        lambda: nn.RMSNorm(width),
        lambda: nn.GroupNorm(draw.choice(divisors(width)), width),
        lambda: Code(lambda _, x: F.normalize(x, dim=-1)),
        lambda: Code(lambda _, x: x / x.norm(dim=1, keepdim=True)),
    ]
    return draw.choice(kinds)()


def activated(draw: Random, shape: Shape) -> nn.Module:
    return activation(draw, shape[0])


def residual(draw: Random, shape: Shape) -> nn.Module:
    inner = draw.choice(WIDTHS)
    layers = [nn.Linear(shape[0], inner), activation(draw, inner), nn.Linear(inner, shape[0])]
    return Code(lambda m, x: x + m.body(x), body=nn.Sequential(*layers))


def _groups(m: Any, x: Tensor) -> Tensor:
    return x.view(x.shape[0], m.groups, -1).mean(2)


def _maxout(m: Any, x: Tensor) -> Tensor:
    return x.view(x.size(0), -1, m.groups).amax(2)


def _by_group(m: Any, x: Tensor) -> Tensor:
    return m.layer(x.unflatten(1, (m.groups, m.each))).flatten(1)


def _matrices(m: Any, x: Tensor) -> Tensor:
    """Multiply each group by a matrix of its own."""
    return torch.einsum("ngi,gio->ngo", x.view(len(x), m.groups, m.each), m.matrices).reshape(len(x), -1)


def grouped(draw: Random, shape: Shape) -> nn.Module:
    groups = draw.choice(divisors(shape[0]))
    each = shape[0] // groups
    numbers = {"groups": groups, "each": each}
    kinds = [
        lambda: Code(_groups, **numbers),
        lambda: Code(_maxout, **numbers),
        lambda: Code(_by_group, layer=nn.Linear(each, 3), **numbers),
        lambda: Code(_matrices, matrices=parameter(groups, each, 4), **numbers),
        lambda: Code(lambda m, x: x.view(-1, m.groups, m.each).softmax(2).flatten(1), **numbers),
        lambda: Code(lambda m, x: x.view(-1, m.groups, m.each).transpose(1, 2).flatten(1), **numbers),
    ]
    return draw.choice(kinds)()


def parted(draw: Random, shape: Shape) -> nn.Module | None:
    width = shape[0]
    if width < 2:
        return None
    left = draw.randrange(1, width)
    kinds = [
        lambda: Code(lambda m, x: torch.cat([x[:, m.left :], x[:, : m.left].sigmoid()], 1), left=left),
        lambda: Code(lambda m, x: m.a(x[:, : m.left]) + m.b(x[:, m.left :]), a=nn.Linear(left, 4),
                     b=nn.Linear(width - left, 4), left=left),
        lambda: Code(lambda _, x: torch.cat(x.tensor_split(2, 1)[::-1], 1)),
        lambda: Code(lambda _, x: x[:, [0, -1]]),
        lambda: Code(lambda _, x: x.narrow(1, 1, x.shape[1] - 1)),
        lambda: Code(lambda _, x: torch.cat([x, x], 1)),
        lambda: Code(lambda _, x: x.tile(1, 2)),
        lambda: Code(lambda _, x: x.diff(dim=1)),
    ]  # fmt: skip
    return draw.choice(kinds)()


def unusual(draw: Random, shape: Shape) -> nn.Module:
    width, inner = shape[0], draw.choice(WIDTHS)
    kinds = [
        lambda: parametrizations.weight_norm(nn.Linear(width, inner)),
        lambda: parametrizations.orthogonal(nn.Linear(width, inner)),
        lambda: Code(lambda m, x: F.linear(F.linear(x, m.matrix).relu(), m.matrix.t()), matrix=parameter(inner, width)),
        lambda: Code(lambda m, x: m.layer(x, x.cos()), layer=nn.Bilinear(width, width, inner)),
        lambda: Code(lambda _, x: (x[:, :, None] * x[:, None, :4]).flatten(1)),
        lambda: Code(lambda m, x: torch.addmm(m.shift, x, m.matrix), shift=parameter(inner),
                     matrix=parameter(width, inner)),
        lambda: Code(lambda m, x: -torch.cdist(x[None], m.centres[None])[0], centres=parameter(inner, width)),
        lambda: Code(lambda m, x: x + m.table.sum(0), table=parameter(3, width)),
        lambda: Code(lambda m, x: F.linear(x, m.low @ m.high), low=parameter(inner, 2), high=parameter(2, width)),
        lambda: Code(lambda m, x: m.cell(x), cell=nn.GRUCell(width, inner)),
        lambda: Code(lambda m, x: m.cell(x)[0], cell=nn.LSTMCell(width, inner)),
        lambda: Code(lambda _, x: x * x.sum(1, keepdim=True) + x.prod(1, keepdim=True)),
        lambda: Code(lambda _, x: torch.kron(x, torch.tensor([[1.0, 2.0]], dtype=x.dtype))),
    ]  # fmt: skip
    return draw.choice(kinds)()


def to_sequence(draw: Random, shape: Shape) -> nn.Module | None:
    each = draw.choice(divisors(shape[0]))
    kinds = [
        Code(lambda m, x: x.view(len(x), -1, m.each), each=each),
        Code(lambda _, x: x[:, None].expand(-1, 3, -1)),
        Code(lambda m, x: m.layer(x).unflatten(1, (3, 4)), layer=nn.Linear(shape[0], 12)),
    ]
    return draw.choice(kinds)


def to_picture(draw: Random, shape: Shape) -> nn.Module:
    layer, channels = nn.Linear(shape[0], 4 * (n := draw.choice([2, 3, 4]))), n
    if coin(draw):
        return Code(
            lambda m, x: m.layer(x).view(x.shape[0], m.channels, 2, 2), layer=layer, channels=channels
        )
    return Code(lambda m, x: m.layer(x).view(len(x), -1, 2, 2), layer=layer)


PIECES: list[Make] = [linear, linear, linear, normed, activated, residual, grouped, grouped, parted, unusual]
EXITS: list[Make] = [to_sequence, to_picture]
