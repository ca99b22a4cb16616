"""Pieces that read pictures, (batch, channels, height, width)."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.zoo.pieces import WIDTHS, Code, Make, Shape, activation, coin, divisors, parameter


def conv(draw: Random, shape: Shape) -> nn.Module:
    channels, height, width = shape
    kernel = draw.choice([1, 3])
    stride = draw.choice([1, 1, 2]) if min(height, width) >= 4 else 1
    out = draw.choice(WIDTHS)
    groups = draw.choice([g for g in divisors(channels) if out % g == 0])
    mode = draw.choice(["zeros", "zeros", "circular"])
    return nn.Conv2d(
        channels, out, kernel, stride, kernel // 2, 1, groups, coin(draw), mode if kernel > 1 else "zeros"
    )


def depthwise(draw: Random, shape: Shape) -> nn.Module:
    return nn.Conv2d(shape[0], shape[0] * draw.choice([1, 1, 2]), 3, padding=1, groups=shape[0])


def transposed(draw: Random, shape: Shape) -> nn.Module | None:
    if max(shape[1:]) > 8:
        return None
    out = draw.choice(WIDTHS)
    groups = draw.choice([g for g in divisors(shape[0]) if out % g == 0])
    settings: dict[str, Any] = draw.choice(
        [{"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "padding": 1}]
    )
    return nn.ConvTranspose2d(shape[0], out, groups=groups, bias=coin(draw), **settings)


def normed(draw: Random, shape: Shape) -> nn.Module:
    channels = shape[0]
    kinds = [
        lambda: nn.BatchNorm2d(channels, affine=coin(draw, 0.8)),
        lambda: nn.GroupNorm(draw.choice(divisors(channels)), channels),
        lambda: nn.InstanceNorm2d(channels, affine=coin(draw)),
        lambda: nn.LayerNorm(list(shape)),
        lambda: Code(
            lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(channels)
        ),
        lambda: nn.LocalResponseNorm(3),
        lambda: Code(lambda m, x: m.scale * F.normalize(x, dim=1), scale=parameter(channels, 1, 1)),
        lambda: Code(lambda _, x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 0.1).sqrt()),
    ]
    return draw.choice(kinds)()


def activated(draw: Random, shape: Shape) -> nn.Module:
    return activation(draw, shape[0])


def resampled(draw: Random, shape: Shape) -> nn.Module | None:
    if min(shape[1:]) < 4:
        return nn.Upsample(scale_factor=2, mode=draw.choice(["nearest", "bilinear"]))
    return draw.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(3)])


def pixels(draw: Random, shape: Shape) -> nn.Module | None:
    if shape[0] % 4 == 0 and shape[1] <= 8:
        return nn.PixelShuffle(2)
    return nn.PixelUnshuffle(2) if shape[1] % 2 == shape[2] % 2 == 0 and shape[0] <= 8 else None


def _shuffle(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _shuffle_left_open(m: Any, x: Tensor) -> Tensor:
    return x.unflatten(1, (m.groups, -1)).transpose(1, 2).flatten(1, 2)


def shuffled(draw: Random, shape: Shape) -> nn.Module:
    groups = draw.choice(divisors(shape[0]))
    return Code(draw.choice([_shuffle, _shuffle_left_open]), groups=groups)


def squeezed(draw: Random, shape: Shape) -> nn.Module:
    channels, inner = shape[0], draw.choice(WIDTHS)
    if coin(draw):
        layers = {"down": nn.Linear(channels, inner), "up": nn.Linear(inner, channels)}
        return Code(
            lambda m, x: x * m.up(m.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None], **layers
        )
    layers = {"down": nn.Conv2d(channels, inner, 1), "up": nn.Conv2d(inner, channels, 1)}
    return Code(lambda m, x: x * m.up(m.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid(), **layers)


def residual(draw: Random, shape: Shape) -> nn.Module:
    channels, inner = shape[0], draw.choice(WIDTHS)
    layers = [nn.Conv2d(channels, inner, 3, padding=1), nn.BatchNorm2d(inner), activation(draw, inner)]
    if coin(draw):
        layers += [nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.ReLU()]
    layers.append(nn.Conv2d(inner, channels, 1, bias=coin(draw)))
    scale = parameter(1, channels, 1, 1) if coin(draw, 0.3) else 1.0
    last = draw.choice([nn.Identity(), nn.ReLU(), nn.BatchNorm2d(channels)])
    return Code(
        lambda m, x: m.last(x + m.scale * m.body(x)), body=nn.Sequential(*layers), scale=scale, last=last
    )


def dense(draw: Random, shape: Shape) -> nn.Module:
    layer = nn.Conv2d(shape[0], draw.choice(WIDTHS), 3, padding=1)
    if coin(draw):
        return Code(lambda m, x: torch.cat([x, m.layer(x).relu()], 1), layer=layer)
    return Code(lambda m, x: torch.cat([m.layer(x), x, m.layer(x).relu()], 1), layer=layer)


def _parts_by_numbers(m: Any, x: Tensor) -> Tensor:
    a, b = x.split([m.left, m.right], 1)
    return torch.cat([m.layer(b), a], 1)


def _parts_by_slices(m: Any, x: Tensor) -> Tensor:
    return torch.cat([x[:, m.left :], m.layer(x[:, -m.right :])], 1)


def _parts_gated(_: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


def parted(draw: Random, shape: Shape) -> nn.Module | None:
    channels = shape[0]
    if channels < 2:
        return None
    if channels % 2 == 0 and coin(draw):
        return draw.choice(
            [nn.GLU(1), Code(_parts_gated), Code(lambda _, x: torch.maximum(x[:, ::2], x[:, 1::2]))]
        )
    left = draw.randrange(1, channels)
    layer = nn.Conv2d(channels - left, draw.choice(WIDTHS), 1)
    run = draw.choice([_parts_by_numbers, _parts_by_slices])
    return Code(run, left=left, right=channels - left, layer=layer)


def weighted(draw: Random, shape: Shape) -> nn.Module:
    """Parameters that are no layer's."""
    channels, height, width = shape
    out = draw.choice(WIDTHS)
    kinds = [
        lambda: Code(
            lambda m, x: x * m.scale + m.shift, scale=parameter(channels, 1, 1), shift=parameter(1, *shape)
        ),
        lambda: Code(
            lambda m, x: torch.einsum("nchw,dc->ndhw", x, m.matrix), matrix=parameter(out, channels)
        ),
        lambda: Code(lambda m, x: x @ m.matrix, matrix=parameter(width, width)),
        lambda: Code(lambda m, x: torch.addcmul(x, m.scale, x), scale=parameter(channels, height, 1)),
    ]
    return draw.choice(kinds)()


def rearranged(draw: Random, shape: Shape) -> nn.Module:
    """Channels that change places, are repeated, padded or reduced."""
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(draw.randrange(1000)))
    kinds = [
        lambda: Code(lambda _, x: x.flip(1)),
        lambda: Code(lambda _, x: x.roll(1, 1)),
        lambda: Code(lambda m, x: x[:, m.order], order=nn.Buffer(order)),
        lambda: Code(lambda _, x: x.repeat(1, 2, 1, 1)),
        lambda: Code(lambda _, x: x.repeat_interleave(2, 1)),
        lambda: Code(lambda _, x: F.pad(x, (0, 0, 0, 0, 1, 2))),
        lambda: Code(lambda _, x: torch.stack([x, x.relu()], 2).flatten(1, 2)),
        lambda: Code(lambda _, x: torch.stack([x, x.relu()], 1).sum(1)),
        lambda: Code(lambda _, x: x.softmax(1)),
        lambda: Code(lambda _, x: x.cumsum(1)),
        lambda: Code(lambda _, x: x - x.amax(1, keepdim=True)),
        lambda: Code(lambda _, x: x * x.pow(2).sum(1, keepdim=True)),
        lambda: Code(lambda _, x: x + x.sort(1).values),
        lambda: Code(lambda _, x: x.transpose(2, 3).contiguous()),
        lambda: Code(lambda _, x: torch.cat(list(x.unbind(1))[::-1], 1).view_as(x) if x.shape[0] else x),
    ]
    return draw.choice(kinds)()


def last_dim(draw: Random, shape: Shape) -> nn.Module:
    layer = nn.Linear(shape[0], draw.choice(WIDTHS))
    return Code(lambda m, x: m.layer(x.permute(0, 2, 3, 1)).movedim(-1, 1), layer=layer)


def twice(draw: Random, shape: Shape) -> nn.Module:
    layer = nn.Conv2d(shape[0], shape[0], 3, padding=1, groups=draw.choice(divisors(shape[0])))
    return Code(lambda m, x: m.layer(m.layer(x).relu()) + x, layer=layer)


def standardised(draw: Random, shape: Shape) -> nn.Module:
    layer = nn.Conv2d(shape[0], draw.choice(WIDTHS), 3, padding=1)

    def run(m: Any, x: Tensor) -> Tensor:
        w = m.layer.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w, m.layer.bias, padding=1)

    return Code(run, layer=layer) if coin(draw) else parametrizations.weight_norm(layer)


def to_sequence(draw: Random, shape: Shape) -> nn.Module:
    kinds = [
        Code(lambda _, x: x.flatten(2).transpose(1, 2)),
        Code(lambda _, x: x.flatten(2)),
        Code(lambda _, x: x.view(x.shape[0], x.shape[1], -1).permute(0, 2, 1)),
        Code(lambda _, x: x.mean(3).transpose(1, 2)),
    ]
    if shape[1] % 2 == shape[2] % 2 == 0:
        kinds.append(Code(lambda _, x: F.unfold(x, 2, stride=2).transpose(1, 2)))
    return draw.choice(kinds)


def to_vector(draw: Random, shape: Shape) -> nn.Module:
    size = shape[0] * shape[1] * shape[2]
    kinds = [
        Code(lambda _, x: x.flatten(1)),
        Code(lambda _, x: x.mean((2, 3))),
        Code(lambda _, x: x.amax((2, 3))),
        Code(lambda _, x: x.view(-1, x.shape[1] * x.shape[2] * x.shape[3])),
        Code(lambda _, x: torch.einsum("nchw,ndhw->ncd", x, x).flatten(1)),
    ]
    if coin(draw, 0.2):  # as many people write it
        kinds.append(Code(lambda m, x: x.reshape(-1, m.size), size=size))
        kinds.append(Code(lambda _, x: x.reshape(x.shape[0], size)))
    return draw.choice(kinds)


PIECES: list[Make] = [
    *(
        conv,
        conv,
        conv,
        depthwise,
        transposed,
        normed,
        normed,
        activated,
        activated,
        resampled,
        pixels,
        shuffled,
    ),
    *(squeezed, residual, residual, dense, parted, weighted, rearranged, last_dim, twice, standardised),
]
EXITS: list[Make] = [to_sequence, to_vector]
