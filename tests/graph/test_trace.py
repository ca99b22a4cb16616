"""Small models, one for each thing that real models do: what is found, and that the small model equals the masked one.

The reference is a deep copy of the model with zeros in float64; nothing of the library computes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.graph import Couplings, Op, Plan, register_rule, trace
from lightning_prune.graph.integers import Attribute, TracedInt
from lightning_prune.graph.python_calls import PythonCalls
from lightning_prune.graph.trace import Tracer
from lightning_prune.graph.types import Type, find, freeze, is_frozen
from lightning_prune.model.equivalence import settle
from lightning_prune.model.surgery import execute_


class Function(nn.Module):
    """A model made of named layers and a function of them."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def with_buffers(model: nn.Module, **buffers: Tensor) -> nn.Module:
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def conv(i: int, o: int, k: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **settings)


def shuffled(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    n, c, h, w = x.shape
    x = x.view(n, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.head(m.b(x).mean((2, 3)))


def packed_attention(m: Any, x: Tensor) -> Tensor:
    n, t, c = (h := m.embed(x)).shape
    q, k, v = m.qkv(m.norm(h)).reshape(n, t, 3, m.num_heads, c // m.num_heads).permute(2, 0, 3, 1, 4)
    weights = (q * (c // m.num_heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    return m.head(h + m.out((weights @ v).transpose(1, 2).reshape(n, t, c)))


def heads_in_the_batch(m: Any, x: Tensor) -> Tensor:
    """Attend over places, as guided-diffusion does: heads are cut before queries, keys and values are."""
    n, _, h, w = (y := m.embed(x)).shape
    q, k, v = m.norm(m.qkv(y)).reshape(n * m.num_heads, -1, h * w).chunk(3, 1)
    weights = torch.einsum("bct,bcs->bts", q, k).mul(q.shape[1] ** -0.5).softmax(-1)
    return m.head(torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, h, w))


def chunked_attention(m: Any, x: Tensor) -> Tensor:
    """Attend over places; queries, keys and values are chunks, and as wide as each other."""
    n, _, h, w = (y := m.embed(x)).shape
    q, k, v = (t.reshape(n, m.num_heads, -1, h * w).transpose(2, 3) for t in m.qkv(y).chunk(3, dim=1))
    return m.head(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, -1, h, w))


def messages(m: Any, x: Tensor) -> Tensor:
    """Send messages along the edges of a graph, and reduce them in three ways."""
    h = m.a(x).relu()
    sent = h[m.source]
    total = torch.zeros_like(h).index_add(0, m.target, m.b(sent))
    places = m.target[:, None].expand_as(sent)
    most = h.new_zeros(x.shape[0], h.shape[1]).scatter_reduce(0, places, sent, "amax")
    last = m.c(sent)
    written = torch.zeros(x.shape[0], last.shape[1], dtype=x.dtype)
    written[m.alone] = last[: len(m.alone)]
    return m.head(torch.cat((total, most.relu(), written), 1))


def grouped_query_attention(m: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q = m.q(x).view(n, t, -1, m.head_dim).transpose(1, 2)
    k, v = (layer(x).view(n, t, -1, m.head_dim).transpose(1, 2) for layer in (m.k, m.v))
    half = torch.cat((-q[..., q.shape[-1] // 2 :], q[..., : q.shape[-1] // 2]), -1)
    q = q * m.cos + half * m.sin
    half = torch.cat((-k[..., k.shape[-1] // 2 :], k[..., : k.shape[-1] // 2]), -1)
    k = k * m.cos + half * m.sin
    k, v = (
        y[:, :, None].expand(n, y.shape[1], m.repeats, t, m.head_dim).reshape(n, -1, t, m.head_dim)
        for y in (k, v)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out(y.transpose(1, 2).reshape(n, t, -1))


def class_token(m: Any, x: Tensor) -> Tensor:
    y = m.patch(x).flatten(2).transpose(1, 2)
    y = torch.cat((m.token.expand(y.shape[0], -1, -1), y), 1) + m.position
    return m.head(m.norm(y * m.scale)[:, 0])


def standardised(m: Any, x: Tensor) -> Tensor:
    w = m.a.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    return m.head(m.b(F.conv2d(x, w, m.a.bias, padding=1).relu()).mean((2, 3)))


def unet(m: Any, x: Tensor) -> Tensor:
    wide = m.a(x).relu()
    low = m.b(F.max_pool2d(wide, 2)).relu()
    return m.head(torch.cat((m.up(low), wide), 1))


def squeezed(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.head((y * m.up(m.down(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None]).flatten(1))


def windows(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).permute(0, 2, 3, 1)
    n, h, w, c = y.shape
    y = y.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)
    return m.head(m.merge(m.norm(y)).mean((1, 2)))


def shifted_windows(m: Any, x: Tensor) -> Tensor:
    """Attention within shifted windows of 4 x 4, with a table of biases by relative position."""
    y = m.embed(x).permute(0, 2, 3, 1)
    n, h, w, c = y.shape
    z = torch.roll(m.norm(y), (-2, -2), (1, 2)).view(n, h // 4, 4, w // 4, 4, c)
    z = m.qkv(z.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c))
    q, k, v = z.reshape(-1, 16, 3, m.num_heads, c // m.num_heads).permute(2, 0, 3, 1, 4)
    bias = m.table[m.index.view(-1)].view(16, 16, -1).permute(2, 0, 1)
    weights = (q * (c // m.num_heads) ** -0.5 @ k.transpose(-2, -1) + bias).softmax(-1)
    z = m.out((weights @ v).transpose(1, 2).reshape(-1, 16, c))
    z = z.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return m.head((y + torch.roll(z, (2, 2), (1, 2))).mean((1, 2)))


def relative_index() -> Tensor:
    """Return for each pair of the 16 places of a window which bias is theirs."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    apart = places[:, None] - places[None] + 3
    return apart[..., 0] * 7 + apart[..., 1]


def interleaved(x: Tensor) -> Tensor:
    """Rotate neighbours by their position, as GPT-J does."""
    angle = torch.arange(x.shape[-2])[:, None] * 0.1
    even, odd = x[..., ::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, -1).flatten(-2)


def complex_rotated(x: Tensor) -> Tensor:
    """Rotate neighbours as complex numbers, as llama's first code does."""
    angle = torch.outer(torch.arange(x.shape[-2]), torch.arange(x.shape[-1] // 2) + 1.0) * 0.1
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def rotary(rotate: Callable[[Tensor], Tensor], *, num_keys: int, shares: bool) -> Function:
    """Return attention with rotated queries and keys; heads share keys in torch's kernel, or those are repeated."""

    def run(m: Any, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k = (rotate(layer(x).view(n, t, -1, m.head_dim).transpose(1, 2)) for layer in (m.q, m.k))
        v = m.v(x).view(n, t, -1, m.value_dim).transpose(1, 2)
        if not shares:
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=shares)
        return m.out(y.transpose(1, 2).reshape(n, t, -1))

    layers = {
        name: nn.Linear(8, 8 * num, bias=False)
        for name, num in zip("qkv", (4, num_keys, num_keys), strict=True)
    }
    return Function(run, **layers, out=nn.Linear(32, 4), head_dim=8, value_dim=8)


def experts(m: Any, x: Tensor) -> Tensor:
    """The best two of four experts for each token, each run on the tokens that chose it."""
    tokens = m.embed(x).flatten(0, 1)
    weights, chosen = m.router(tokens).softmax(-1).topk(2, -1)
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(m.experts):
        share = (weights * (chosen == number)).sum(-1, keepdim=True)
        out = out + share * expert(tokens)
    return m.head(out)


class Wrapped(L.LightningModule):
    """A module in a module, with a loss and a metric inside, which a call returns beside the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"body": nn.Linear(8, 12), "head": nn.Linear(12, 4)})
        self.loss, self.accuracy = nn.CrossEntropyLoss(), MulticlassAccuracy(4)

    def forward(self, x: Tensor) -> Any:
        logits = self.net["head"](self.net["body"](x).relu()).flatten(0, 1)
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return {"logits": logits, "loss": self.loss(logits, target), "seen": [logits.mean(0)]}


IMAGE, TOKENS = torch.Size((2, 3, 8, 8)), torch.Size((2, 5, 8))
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Size, set[str]]] = {
    "residual": (
        lambda: Function(
            lambda m, x: m.head((m.a(x) + m.c(m.b(m.a(x)).relu())).mean((2, 3))),
            a=conv(3, 8),
            b=conv(8, 6),
            c=conv(6, 8),
            head=nn.Linear(8, 4),
        ),
        IMAGE,
        {"a.weight", "b.weight"},
    ),
    "concatenation": (
        lambda: Function(
            lambda m, x: m.head(torch.cat((m.a(x), m.b(x)), 1).flatten(1)),
            a=conv(3, 4),
            b=conv(3, 6),
            head=nn.Linear(640, 4),
        ),
        IMAGE,
        {"a.weight", "b.weight"},
    ),
    "halves that are gated": (
        lambda: Function(
            lambda m, x: m.head((lambda a, b: a * b.sigmoid())(*m.a(x).chunk(2, -1))),
            a=nn.Linear(8, 12),
            head=nn.Linear(6, 4),
        ),
        TOKENS,
        {"a.weight"},
    ),
    "halves that part": (
        lambda: Function(
            lambda m, x: (lambda a, b: m.head(a) + m.other(b))(*m.a(x).chunk(2, -1)),
            a=nn.Linear(8, 12),
            head=nn.Linear(6, 4),
            other=nn.Linear(6, 4),
        ),
        TOKENS,
        {"a.weight", "a.weight[dim 0]"},
    ),
    "split by attributes": (
        lambda: Function(
            lambda m, x: (lambda a, b: m.head(a) + m.other(b))(*m.a(x).split([m.left, m.right], -1)),
            a=nn.Linear(8, 10),
            left=4,
            right=6,
            head=nn.Linear(4, 4),
            other=nn.Linear(6, 4),
        ),
        TOKENS,
        {"a.weight", "a.weight[dim 0]"},
    ),
    "slices by attributes": (
        lambda: Function(
            lambda m, x: (lambda y: m.head(y[..., : m.left]) + m.other(y[:, :, -m.right :]))(m.a(x)),
            a=nn.Linear(8, 10),
            left=4,
            right=6,
            head=nn.Linear(4, 4),
            other=nn.Linear(6, 4),
        ),
        TOKENS,
        {"a.weight", "a.weight[dim 0]"},
    ),
    "narrowed by attributes": (
        lambda: Function(
            lambda m, x: (lambda y: m.head(y.narrow(-1, 0, m.left)) + m.other(y.narrow(-1, m.left, m.right)))(
                m.a(x)
            ),
            a=nn.Linear(8, 10),
            left=4,
            right=6,
            head=nn.Linear(4, 4),
            other=nn.Linear(6, 4),
        ),
        TOKENS,
        {"a.weight", "a.weight[dim 0]"},
    ),
    "grouped convolution": (
        lambda: Function(
            lambda m, x: m.head(m.b(m.a(x)).flatten(1)),
            a=conv(3, 8),
            b=conv(8, 16, groups=2),
            head=nn.Linear(1024, 4),
        ),
        IMAGE,
        {"a.weight", "a.weight[part]", "b.weight"},
    ),
    "depthwise convolution": (
        lambda: Function(
            lambda m, x: m.head(m.n(m.b(m.a(x))).mean((2, 3))),
            a=conv(3, 8),
            b=conv(8, 8, groups=8),
            n=nn.BatchNorm2d(8),
            head=nn.Linear(8, 4),
        ),
        IMAGE,
        {"a.weight"},
    ),
    "transposed convolution": (
        lambda: Function(
            lambda m, x: m.head(m.b(m.a(x)).mean((2, 3))),
            a=conv(3, 8),
            b=nn.ConvTranspose2d(8, 6, 2, 2),
            head=nn.Linear(6, 4),
        ),
        IMAGE,
        {"a.weight", "b.weight"},
    ),
    "channel shuffle": (
        lambda: Function(shuffled, a=conv(3, 12), b=conv(12, 6), groups=2, head=nn.Linear(6, 4)),
        IMAGE,
        {"a.weight", "a.weight[part]", "b.weight"},
    ),
    "group norm": (
        lambda: Function(
            lambda m, x: m.head(m.n(m.a(x)).mean((2, 3))),
            a=conv(3, 8),
            n=nn.GroupNorm(2, 8),
            head=nn.Linear(8, 4),
        ),
        IMAGE,
        {"a.weight", "a.weight[part]"},
    ),
    "packed attention": (
        lambda: Function(
            packed_attention,
            embed=nn.Linear(8, 16),
            qkv=nn.Linear(16, 48),
            norm=nn.LayerNorm(16),
            num_heads=4,
            out=nn.Linear(16, 16),
            head=nn.Linear(16, 4),
        ),
        TOKENS,
        {"embed.weight", "qkv.weight[head]", "qkv.weight[head_dim]"},
    ),
    "attention with heads in the batch": (
        lambda: Function(
            heads_in_the_batch,
            embed=conv(3, 16, 1),
            qkv=conv(16, 48, 1),
            norm=nn.BatchNorm2d(48),
            head=conv(16, 4, 1),
            num_heads=4,
        ),
        IMAGE,
        {"embed.weight", "qkv.weight[head]", "qkv.weight[head_dim]", "qkv.weight[head_dim][dim 0]"},
    ),
    "attention with chunks": (
        lambda: Function(
            chunked_attention, embed=conv(3, 16, 1), qkv=conv(16, 48, 1), head=conv(16, 4, 1), num_heads=4
        ),
        IMAGE,
        {"embed.weight", "qkv.weight[head]", "qkv.weight[head_dim]", "qkv.weight[head_dim][dim 0]"},
    ),
    "messages along edges": (
        lambda: with_buffers(
            Function(
                messages, a=nn.Linear(8, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 4), head=nn.Linear(16, 3)
            ),
            source=torch.tensor([0, 1, 2, 3, 3, 0]),
            target=torch.tensor([1, 1, 0, 2, 4, 4]),
            alone=torch.tensor([0, 3, 4]),
        ),
        torch.Size([5, 8]),
        {"a.weight", "c.weight"},
    ),
    "grouped-query attention with rotary positions": (
        lambda: Function(
            grouped_query_attention,
            q=nn.Linear(8, 32, bias=False),
            k=nn.Linear(8, 16, bias=False),
            v=nn.Linear(8, 16, bias=False),
            out=nn.Linear(32, 4),
            head_dim=8,
            repeats=2,
            cos=nn.Buffer(torch.rand(5, 4).repeat(1, 2)),
            sin=nn.Buffer(torch.rand(5, 4).repeat(1, 2)),
        ),
        TOKENS,
        {"q.weight[head]", "q.weight[head][dim 0]", "q.weight[head_dim]", "v.weight[head_dim]"},
    ),
    "multi-query attention with interleaved rotary positions": (
        lambda: rotary(interleaved, num_keys=1, shares=False),
        TOKENS,
        {"q.weight[head]", "q.weight[head_dim]", "v.weight[head_dim]"},
    ),
    "grouped queries in torch's kernel with complex rotary positions": (
        lambda: rotary(complex_rotated, num_keys=2, shares=True),
        TOKENS,
        {"q.weight[head]", "q.weight[head][dim 0]", "v.weight[head_dim]"},
    ),
    "shifted windows with biases by relative position": (
        lambda: Function(
            shifted_windows,
            embed=nn.Conv2d(3, 16, 1),
            norm=nn.LayerNorm(16),
            qkv=nn.Linear(16, 48),
            out=nn.Linear(16, 16),
            head=nn.Linear(16, 4),
            table=nn.Parameter(torch.randn(49, 4)),
            index=nn.Buffer(relative_index()),
            num_heads=4,
        ),
        IMAGE,
        {"embed.weight", "qkv.weight[head_dim]", "table[head]"},
    ),
    "experts": (
        lambda: Function(
            experts,
            embed=nn.Linear(8, 12),
            router=nn.Linear(12, 4),
            experts=nn.ModuleList(
                nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)) for _ in range(4)
            ),
            head=nn.Linear(12, 4),
        ),
        TOKENS,
        {"embed.weight", *(f"experts.{i}.0.weight" for i in range(4))},
    ),
    "a Lightning module with a loss and a metric": (Wrapped, TOKENS, {"net.body.weight"}),
    "class token, position embedding and layer scale": (
        lambda: Function(
            class_token,
            patch=nn.Conv2d(3, 8, 4, 4),
            token=nn.Parameter(torch.randn(1, 1, 8)),
            position=nn.Parameter(torch.randn(1, 5, 8)),
            scale=nn.Parameter(torch.randn(8)),
            norm=nn.LayerNorm(8),
            head=nn.Linear(8, 4),
        ),
        IMAGE,
        {"token"},
    ),
    "weight standardisation": (
        lambda: Function(standardised, a=conv(3, 8), b=conv(8, 6), head=nn.Linear(6, 4)),
        IMAGE,
        {"a.weight", "b.weight"},
    ),
    "u-net": (
        lambda: Function(
            unet, a=conv(3, 8), b=conv(8, 6), up=nn.ConvTranspose2d(6, 4, 2, 2), head=conv(12, 2)
        ),
        IMAGE,
        {"a.weight", "b.weight", "up.weight"},
    ),
    "squeeze and excitation": (
        lambda: Function(
            squeezed, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), head=nn.Linear(512, 4)
        ),
        IMAGE,
        {"a.weight", "down.weight"},
    ),
    "windows and patch merging": (
        lambda: Function(
            windows, a=conv(3, 8), norm=nn.LayerNorm(32), merge=nn.Linear(32, 12), head=nn.Linear(12, 4)
        ),
        IMAGE,
        {"a.weight", "merge.weight"},
    ),
    "multi-head attention": (
        lambda: Function(
            lambda m, x: m.head((h := m.embed(x)) + m.attention(h, h, h)[0]),
            embed=nn.Linear(8, 16),
            attention=nn.MultiheadAttention(16, 4, batch_first=True),
            head=nn.Linear(16, 4),
        ),
        TOKENS,
        {
            "embed.weight",
            "attention.in_proj_weight[head]",
            "attention.in_proj_weight[head_dim]",
            "attention.in_proj_weight[head_dim][dim 0]",
        },
    ),
    "transformer encoder": (
        lambda: Function(
            lambda m, x: m.head(m.body(m.embed(x))),
            embed=nn.Linear(8, 16),
            body=nn.TransformerEncoderLayer(16, 2, 24, batch_first=True),
            head=nn.Linear(16, 4),
        ),
        TOKENS,
        {
            "embed.weight",
            "body.self_attn.in_proj_weight[head]",
            "body.self_attn.in_proj_weight[head_dim]",
            "body.self_attn.in_proj_weight[head_dim][dim 0]",
            "body.linear1.weight",
        },
    ),
    "lstm": (
        lambda: Function(
            lambda m, x: m.head(m.body(m.embed(x))[0]),
            embed=nn.Linear(8, 6),
            body=nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True),
            head=nn.Linear(16, 4),
        ),
        TOKENS,
        {"embed.weight", "body.weight_ih_l0"},
    ),
    "gru": (
        lambda: Function(
            lambda m, x: m.head(m.body(x)[0]), body=nn.GRU(8, 6, batch_first=True), head=nn.Linear(6, 4)
        ),
        TOKENS,
        {"body.weight_ih_l0"},
    ),
    "instance norm": (
        lambda: Function(
            lambda m, x: m.head(m.n(m.a(x)).mean((2, 3))),
            a=conv(3, 8),
            n=nn.InstanceNorm2d(8, affine=True),
            head=nn.Linear(8, 4),
        ),
        IMAGE,
        {"a.weight"},
    ),
    "embedding bag": (
        lambda: Function(
            lambda m, x: m.head(m.a((x[..., 0] > 0).long())), a=nn.EmbeddingBag(5, 6), head=nn.Linear(6, 4)
        ),
        TOKENS,
        {"a.weight"},
    ),
    "several outputs": (
        lambda: Function(
            lambda m, x: {"low": m.b(m.a(x).relu()), "high": [m.c(m.a(x).relu())]},
            a=conv(3, 8),
            b=conv(8, 2),
            c=conv(8, 3),
        ),
        IMAGE,
        {"a.weight"},
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    model = make().eval().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model, torch.randn(shape, dtype=torch.float64)


def half(couplings: Couplings, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Keep a random half of each group."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randperm(group.size, generator=generator) < group.size // 2
        for name, group in couplings.groups.items()
        if group.role not in skip
    }


def leaves(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for entry in (output.values() if isinstance(output, dict) else output) for t in leaves(entry)]


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_are_those_that_the_model_has(name: str) -> None:
    model, x = build(name)
    couplings = trace(model, (x,))
    assert set(couplings.groups) == MODELS[name][2]
    assert couplings.record.is_fake


@pytest.mark.parametrize("skip", [("head", "part"), ("head_dim",)], ids=["widths", "heads"])
@pytest.mark.parametrize("name", MODELS)
def test_the_small_model_equals_the_masked_one(name: str, skip: tuple[str, ...]) -> None:
    model, x = build(name)
    dense = copy.deepcopy(model)
    couplings = trace(model, (x,))
    frozen: list[str] = []
    choice, plan = settle(
        couplings, lambda: half(couplings, skip), freeze=lambda names, _: frozen.extend(names)
    )
    assert not frozen and choice
    assert plan.error is not None and plan.error < 1e-12
    execute_(model, plan)
    assert_shapes_follow(model, couplings, plan)
    if any(group.is_renormalised for group in couplings.groups.values()):
        return  # the masked model's means run over zeros as well; `plan.error` is measured over what survives
    for key, mask in couplings.masks(choice).items():
        dense.get_submodule(key.rpartition(".")[0]).state_dict(keep_vars=True)[
            key.rpartition(".")[2]
        ].data.mul_(mask)
    with torch.no_grad():
        for small, masked in zip(leaves(model(x)), leaves(dense(x)), strict=True):
            torch.testing.assert_close(small, masked, rtol=1e-12, atol=1e-12)


def assert_shapes_follow(model: nn.Module, couplings: Couplings, plan: Plan) -> None:
    counts = {name: kept for name, (_, kept) in plan.groups.items()}
    sizes = couplings.sizes(counts)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name: tuple(t.shape) for name, t in state.items()} == sizes
    assert couplings.num_params(counts) == sum(p.numel() for p in model.parameters())
    assert any(sizes[name] != shape for name, shape in couplings.shapes.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_slice_is_noticed(name: str) -> None:
    """The negative control: other rows of one coupled tensor, of the same number, make the difference large."""
    from dataclasses import replace

    from lightning_prune.model.equivalence import relative_error

    model, x = build(name)
    couplings = trace(model, (x,))
    choice, plan = settle(couplings, lambda: half(couplings, ("head", "part")))
    slices = {tensor: dict(dims) for tensor, dims in plan.slices.items()}
    tensor = next(t for t, dims in slices.items() if dims.keys() - {0} and t.endswith("weight"))
    dim = max(slices[tensor])
    size, kept = couplings.shapes[tensor][dim], slices[tensor][dim]
    slices[tensor][dim] = tuple(sorted((i + 1) % size for i in kept))
    assert slices[tensor][dim] != kept
    assert relative_error(couplings, choice, replace(plan, slices=slices)) > 1e-4


def test_the_scale_of_attention_stays_that_of_the_dense_model() -> None:
    model, x = build("packed attention")
    couplings = trace(model, (x,))
    _, plan = settle(couplings, lambda: half(couplings, ("head",)))
    assert {(s.name, s.dim, len(s.indices)) for s in plan.scales} == {
        ("qkv.weight", 0, 16),
        ("qkv.bias", 0, 16),
    }
    assert [s.factor for s in plan.scales] == [pytest.approx(math.sqrt(2 / 4))] * 2


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("halves that part", ("a.weight", "a.weight[dim 0]")),
        ("attention with chunks", ("qkv.weight[head_dim]", "qkv.weight[head_dim][dim 0]")),
        ("attention with heads in the batch", ("qkv.weight[head_dim]", "qkv.weight[head_dim][dim 0]")),
    ],
)
def test_chunks_keep_equally_many(name: str, tied: tuple[str, ...]) -> None:
    model, x = build(name)
    couplings = trace(model, (x,))
    assert couplings.ties == (tied,)


def test_freezing_a_group_renames_no_other() -> None:
    """Names say what else there is, so those of a group that was found later would change."""
    model, x = build("split by attributes")
    couplings = trace(model, (x,))
    couplings.freeze(["a.weight"], "to see what becomes of the other")
    assert list(couplings.groups) == ["a.weight[dim 0]"]
    _, plan = settle(couplings, lambda: half(couplings))
    assert plan.groups == {"a.weight[dim 0]": (6, 3)} and plan.attributes == {"": {"right": 3}}


def test_outputs_inputs_and_vocabularies_stay_with_the_reason() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4))
    couplings = trace(model, (torch.zeros(2, 3, dtype=torch.long),))
    assert set(couplings.groups) == {"0.weight"}
    assert couplings.frozen == {
        "0.weight[0]": "vocabulary of an embedding",
        "1.weight[0]": "output of the model",
        "1.bias[0]": "output of the model",
    }


def test_tied_weights_are_one_tensor() -> None:
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(6, 6), head).double()
    couplings = trace(model, (torch.zeros(2, 3, dtype=torch.long),))
    assert couplings.frozen["0.weight[0]"]
    assert {name: group.tensors for name, group in couplings.groups.items()} == {
        "0.weight": ("0.weight", "1.weight"),
        "1.weight": ("0.weight", "1.weight", "1.bias"),
    } or list(couplings.groups) == ["0.weight"]


def test_a_size_written_in_the_code_freezes_and_says_where() -> None:
    model = Function(
        lambda m, x: m.head(m.a(x).view(2, 5, 3, 4).sum(2)), a=nn.Linear(8, 12), head=nn.Linear(4, 2)
    )
    couplings = trace(model, (torch.randn(TOKENS),))
    assert couplings.groups == {}
    assert (
        couplings.frozen["a.weight[0]"]
        == "size 3 written in view of the model; size 4 written in view of the model"
    )


def test_an_operation_without_a_rule_freezes_what_it_touches() -> None:
    model = Function(
        lambda m, x: m.head(torch.cdist(m.b(m.a(x).relu()), m.codes)),
        a=nn.Linear(8, 6),
        b=nn.Linear(6, 4),
        codes=nn.Parameter(torch.randn(3, 4)),
        head=nn.Linear(3, 2),
    )
    couplings = trace(model, (torch.randn(TOKENS),))
    assert set(couplings.groups) == {"a.weight"}
    assert "has no rule" in couplings.frozen["b.weight[0]"] or "cdist" in couplings.frozen["b.weight[0]"]


def test_a_rule_of_ones_own_is_used() -> None:
    library = torch.library.Library("lightning_prune_test", "FRAGMENT")
    library.define("mirror(Tensor x) -> Tensor")
    library.impl("mirror", lambda x: -x, "CompositeExplicitAutograd")
    model = Function(
        lambda m, x: m.head(torch.ops.lightning_prune_test.mirror(m.a(x))),
        a=nn.Linear(8, 6),
        head=nn.Linear(6, 2),
    )
    x = torch.randn(TOKENS)
    assert trace(model, (x,)).groups == {}

    def mirror(op: Op) -> list[Any]:
        return op.first

    register_rule("mirror", mirror)
    assert set(trace(model, (x,)).groups) == {"a.weight"}
    register_rule("mirror", lambda op: [freeze(node, "mirrored") for node in op.first] and op.first)
    assert trace(model, (x,)).frozen["a.weight[0]"] == "mirrored"
    with pytest.raises(ValueError, match="without namespace or overload, but got 'aten::mul'"):
        register_rule("aten::mul", mirror)


class Packed(nn.Module):
    """Sequences of unlike lengths, packed for a recurrent layer and padded again behind it."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.a, self.b, self.layer = nn.Linear(8, 12), nn.Linear(12, 10), layer
        self.out = nn.Linear((1 + layer.bidirectional) * (layer.proj_size or layer.hidden_size), 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = bool(self.layer.batch_first)
        y = self.b(self.a(x).relu())
        packed = nn.utils.rnn.pack_padded_sequence(y, lengths, batch_first=first, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=first)
        return self.out(padded)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (nn.LSTM, {"bidirectional": True}),
        (nn.LSTM, {"proj_size": 4}),
        (nn.GRU, {"bidirectional": True, "num_layers": 2}),
        (nn.RNN, {}),
    ],
)
def test_packed_sequences_are_followed(
    kind: type[nn.RNNBase], settings: dict[str, Any], batch_first: bool
) -> None:
    torch.manual_seed(0)
    model = Packed(kind(10, 6, batch_first=batch_first, **settings)).eval()
    x = torch.randn((3, 5, 8) if batch_first else (5, 3, 8))
    couplings = trace(model, (x, torch.tensor([5, 2, 3])))
    frozen: dict[str, str] = {}
    choice, plan = settle(
        couplings, lambda: half(couplings), freeze=lambda n, why: frozen.update(dict.fromkeys(n, why))
    )
    assert {"a.weight", "b.weight", "layer.weight_ih_l0"} <= set(choice) and not frozen
    execute_(model, plan)
    assert (model.b.out_features, model.layer.input_size, model.layer.hidden_size) == (5, 5, 3)


def test_a_number_that_is_another_than_the_size_is_not_about_it() -> None:
    calls = PythonCalls(tracer := Tracer({}))
    for size in (3, 16):
        calls.equate(TracedInt(16, Attribute("lstm", "hidden_size", None, 16)), Type(size), "a new tensor")
    calls.equate(16, written := Type(3), "a new tensor")
    assert [find(e.type).size for e in tracer.record.equations] == [16] and not is_frozen(written)


class Routed(nn.Module):
    """Experts for the rows that are routed to them, how many depends on their values."""

    def __init__(self, by_mask: bool) -> None:
        super().__init__()
        self.a, self.router, self.out, self.by_mask = (
            nn.Linear(8, 16),
            nn.Linear(16, 3),
            nn.Linear(16, 4),
            by_mask,
        )
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(h := self.a(x))
        weights, chosen = self.router(h).softmax(-1).topk(1 if self.by_mask else 2, -1)
        for number, expert in enumerate(self.experts):
            rows, slots = (here := chosen == number).nonzero(as_tuple=True)
            if self.by_mask:
                total[here[:, 0]] = expert(h[here[:, 0]]) * weights[here[:, 0]]
            else:
                total.index_add_(0, rows, expert(h[rows]) * weights[rows, slots, None])
        return self.out(h + total)  # type: ignore[no-any-return]


@pytest.mark.parametrize("by_mask", [True, False])
def test_experts_lose_channels_though_they_see_other_rows_then(by_mask: bool) -> None:
    torch.manual_seed(0)
    couplings = trace(Routed(by_mask).eval(), (torch.randn(40, 8),))
    frozen: list[str] = []
    choice, plan = settle(couplings, lambda: half(couplings), freeze=lambda names, _: frozen.extend(names))
    assert set(choice) == {"a.weight", *(f"experts.{i}.0.weight" for i in range(3))} and not frozen
    assert not couplings.record.is_fake and plan.error is not None and plan.error < 1e-12


def test_code_that_reads_values_is_traced_on_real_tensors() -> None:
    model = Function(
        lambda m, x: m.head(m.a(x).relu() if float(x.sum()) > -1e9 else m.a(x)),
        a=nn.Linear(8, 6),
        head=nn.Linear(6, 2),
    )
    couplings = trace(model, (torch.randn(TOKENS),))
    assert not couplings.record.is_fake
    assert set(couplings.groups) == {"a.weight"}
    _, plan = settle(couplings, lambda: half(couplings))
    assert plan.groups == {"a.weight": (6, 3)}


def test_a_trace_leaves_no_trace() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.width, self.cache, self.kept = nn.Linear(8, 6), 6, None, {}
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.cache = self.kept["last"] = self.a(x).view(-1, self.width)
            self.seen = self.seen + 1
            return F.dropout(self.cache, 0.5, training=True).sum(-1)

    model = Caching().train()
    before, state = dict(vars(model)), copy.deepcopy(model.state_dict())
    x = torch.randn(TOKENS)
    generator = torch.get_rng_state()
    trace(model, (x,))
    assert torch.equal(torch.get_rng_state(), generator)
    assert vars(model) == before and type(model.width) is int and model.cache is None and model.kept == {}
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert math.sqrt(4) == 2.0 and type(math.sqrt(4)) is float
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_rows_under_weight_norm_stay_since_masked_ones_would_be_divided_by_zero() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    couplings = trace(nn.Sequential(layer, nn.Linear(6, 4)), (torch.randn(2, 8),))
    assert couplings.groups == {}
    assert "weight norm divides" in couplings.frozen["1.weight[1]"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_scripted_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="scripted modules, 0: prune it before it is scripted"):
        trace(nn.Sequential(torch.jit.script(nn.Linear(2, 2))), (torch.randn(1, 2),))


def test_training_mode_finds_the_same_groups() -> None:
    model, x = build("depthwise convolution")
    assert set(trace(model, (x,), training=True).groups) == set(trace(model, (x,)).groups)


def test_a_table_of_positions_that_is_read_in_full_is_part_of_the_call() -> None:
    """A slice of all there is does nothing, and is no operation."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a = nn.Parameter(torch.randn(1, 6, 8)), nn.Linear(4, 8)
            self.b = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.table[:, : x.shape[1]])

    groups = [trace(Places(), (torch.randn(2, length, 4),)).groups for length in (5, 6)]
    assert [{n: g.size for n, g in found.items()} for found in groups] == [{"table": 8}] * 2


def test_names_are_those_of_the_root() -> None:
    model, x = build("residual")
    root = nn.ModuleDict({"net": model, "other": nn.Linear(2, 2)})
    couplings = trace(model, (x,), root=root)
    assert set(couplings.groups) == {"net.a.weight", "net.b.weight"}
