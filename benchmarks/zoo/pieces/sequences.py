"""Pieces that read sequences, (batch, length, width)."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.pieces import WIDTHS, Code, Make, Shape, activation, coin, divisors, parameter


def linear(draw: Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[1], draw.choice(WIDTHS), bias=coin(draw, 0.7))


def normed(draw: Random, shape: Shape) -> nn.Module:
    length, width = shape
    kinds = [
        lambda: nn.LayerNorm(width),
        lambda: nn.LayerNorm([length, width]),
        lambda: nn.RMSNorm(width),
        lambda: nn.BatchNorm1d(length),
        lambda: Code(lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(width)),
        lambda: Code(
            lambda m, x: m.scale * x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt(),
            scale=parameter(width),
        ),
    ]
    return draw.choice(kinds)()


def activated(draw: Random, shape: Shape) -> nn.Module:
    return activation(draw, shape[0])


def gated(draw: Random, shape: Shape) -> nn.Module:
    inner = draw.choice(WIDTHS)
    if coin(draw):
        layers = {"up": nn.Linear(shape[1], 2 * inner), "down": nn.Linear(inner, shape[1])}
        return Code(lambda m, x: x + m.down((lambda a, b: a * F.gelu(b))(*m.up(x).chunk(2, -1))), **layers)
    layers = {n: nn.Linear(shape[1], inner, bias=False) for n in ("gate", "up")}
    return Code(
        lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x)), down=nn.Linear(inner, shape[1]), **layers
    )


def _packed(m: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = m.qkv(x).reshape(n, t, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4)
    weights = (q * m.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
    return x + m.out((weights @ v).transpose(1, 2).reshape(n, t, -1))


def _packed_by_width(m: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = m.qkv(x).split(m.inner, -1)
    q, k, v = (y.view(n, t, m.num_heads, m.inner // m.num_heads).transpose(1, 2) for y in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out(y.transpose(1, 2).contiguous().view(n, t, m.inner)) + x


def _einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (m.num_heads, -1)) for y in m.qkv(x).chunk(3, -1))
    weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / m.head_dim**0.5).softmax(-1)
    return x + m.out(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))


def _shared_keys(m: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q = m.q(x).view(n, t, -1, m.head_dim).transpose(1, 2)
    k, v = (layer(x).view(n, t, -1, m.head_dim).transpose(1, 2) for layer in (m.k, m.v))
    k, v = (
        y[:, :, None].expand(n, y.shape[1], m.repeats, t, m.head_dim).reshape(n, -1, t, m.head_dim)
        for y in (k, v)
    )
    return x + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


def attention(draw: Random, shape: Shape) -> nn.Module:
    heads, width = draw.choice([1, 2, 4]), draw.choice([2, 3, 4, 8])
    inner, out = heads * width, nn.Linear(heads * width, shape[1])
    numbers = {"num_heads": heads, "head_dim": width, "inner": inner}
    if coin(draw, 0.3):
        pairs = draw.choice(divisors(heads))
        layers = {n: nn.Linear(shape[1], pairs * width, bias=False) for n in ("k", "v")}
        return Code(
            _shared_keys, q=nn.Linear(shape[1], inner), out=out, repeats=heads // pairs, **layers, **numbers
        )
    run = draw.choice([_packed, _packed_by_width, _einsum])
    return Code(run, qkv=nn.Linear(shape[1], 3 * inner, bias=coin(draw)), out=out, **numbers)


def torch_attention(draw: Random, shape: Shape) -> nn.Module | None:
    width = shape[1]
    heads = draw.choice(divisors(width))
    if coin(draw):
        return nn.TransformerEncoderLayer(
            width, heads, draw.choice(WIDTHS), batch_first=True, norm_first=coin(draw), activation="gelu"
        )
    inner = nn.MultiheadAttention(width, heads, batch_first=True, bias=coin(draw))
    need = coin(draw)
    return Code(lambda m, x: x + m.inner(x, x, x, need_weights=need)[0], inner=inner)


def recurrent(draw: Random, shape: Shape) -> nn.Module:
    kind = draw.choice([nn.LSTM, nn.GRU, nn.RNN])
    more: dict[str, Any] = {"proj_size": 2} if kind is nn.LSTM and coin(draw, 0.3) else {}
    layers, both = draw.choice([1, 1, 2]), coin(draw)
    layer = kind(
        shape[1],
        draw.choice([3, 4, 6, 8]),
        layers,
        batch_first=True,
        bidirectional=both,
        bias=coin(draw),
        **more,
    )
    return Code(lambda m, x: m.layer(x)[0], layer=layer)


def convolved(draw: Random, shape: Shape) -> nn.Module:
    length, width = shape
    if coin(draw, 0.3):  # positions for channels
        return nn.Conv1d(length, draw.choice([2, 3, 4]), 3, padding=1)
    groups = draw.choice(divisors(width))
    layer = nn.Conv1d(width, groups * draw.choice([1, 2]), 3, groups=groups)
    return Code(lambda m, x: m.layer(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), layer=layer)


def placed(draw: Random, shape: Shape) -> nn.Module:
    length, width = shape
    kinds = [
        lambda: Code(lambda m, x: x + m.place[: x.shape[1]], place=parameter(length + 2, width)),
        lambda: Code(
            lambda m, x: x + m.place(torch.arange(x.shape[1])), place=nn.Embedding(length + 1, width)
        ),
        lambda: Code(
            lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1), token=parameter(1, 1, width)
        ),
        lambda: Code(lambda m, x: x * m.scale, scale=parameter(width)),
        lambda: Code(lambda m, x: m.mix(x.transpose(1, 2)).transpose(1, 2), mix=nn.Linear(length, length)),
        lambda: Code(lambda m, x: x @ m.matrix + m.shift, matrix=parameter(width, 6), shift=parameter(6)),
    ]
    return draw.choice(kinds)()


def _linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1
    return q @ (k.transpose(-2, -1) @ m.v(x))


def _experts(m: Any, x: Tensor) -> Tensor:
    shares = m.gate(x).softmax(-1)
    return torch.stack([expert(x) for expert in m.experts], -1).mul(shares[..., None, :]).sum(-1)


def mixed(draw: Random, shape: Shape) -> nn.Module:
    width, out = shape[1], draw.choice(WIDTHS)
    kinds = [
        lambda: Code(_linear_attention, **{n: nn.Linear(width, out) for n in "qkv"}),
        lambda: Code(
            _experts,
            gate=nn.Linear(width, 3),
            experts=nn.ModuleList(
                nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, out)) for _ in range(3)
            ),
        ),
        lambda: Code(lambda m, x: torch.cat([x, m.layer(x)], -1), layer=nn.Linear(width, out)),
        lambda: Code(lambda _, x: torch.cat([x, x.flip(1)], 1)),
        lambda: Code(lambda _, x: x.softmax(-1)),
        lambda: Code(lambda _, x: x.cumsum(1)),
        lambda: Code(lambda _, x: torch.cat([x[:, :, :1], x[:, :, 1:].relu()], -1)),
        lambda: Code(lambda _, x: torch.fft.rfft(x, dim=1).real),
        lambda: Code(lambda _, x: x - x.mean(1, keepdim=True)),
    ]
    return draw.choice(kinds)()


def to_vector(draw: Random, shape: Shape) -> nn.Module:
    kinds = [
        Code(lambda _, x: x.mean(1)),
        Code(lambda _, x: x[:, 0]),
        Code(lambda _, x: x[:, -1]),
        Code(lambda _, x: x.max(1).values),
        Code(lambda _, x: x.flatten(1)),
        Code(lambda _, x: x.reshape(len(x), -1)),
        Code(lambda _, x: torch.cat([x.mean(1), x.std(1)], -1)),
        Code(lambda _, x: x.transpose(1, 2).reshape(x.size(0), -1)),
    ]
    return draw.choice(kinds)


PIECES: list[Make] = [
    *(linear, linear, linear, normed, activated, gated, attention, attention, torch_attention, recurrent),
    *(convolved, placed, placed, mixed),
]
EXITS: list[Make] = [to_vector]
