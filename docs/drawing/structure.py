"""The pictures of coupled groups, and of what is left without them."""

from __future__ import annotations

import copy

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import lightning_prune as lp
from drawing.base import COLOURS, ORANGE, SLATE, TEAL, new_figure
from lightning_prune.examples.networks import ResNet20
from lightning_prune.graph import trace
from lightning_prune.model.calls import Call
from lightning_prune.model.cost import measure


def shrinking() -> Figure:
    """Channels, parameters and work are three things."""
    example = torch.zeros(16, 3, 32, 32)
    dense = ResNet20()
    call = Call(dense, (example,), {})
    before = measure(dense, call, latency=False)
    kept, params, macs = [1.0], [1.0], [1.0]
    for sparsity in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        network = copy.deepcopy(dense)
        plan = lp.shrink(network, example, sparsity, scope=lp.Local(), granularity=lp.Channel(multiple_of=1))
        after = measure(network, Call(network, (example,), {}), latency=False)
        counts = plan.groups.values()
        kept.append(sum(k for _, k in counts) / sum(n for n, _ in counts))
        params.append(after.params / before.params)
        macs.append(after.macs / before.macs)
    figure = new_figure(7.2, 2.8)
    ax = figure.subplots()
    ax.plot([100 * (1 - k) for k in kept], [100 * k for k in kept], ":", color=SLATE, label="channels")
    ax.plot(
        [100 * (1 - k) for k in kept], [100 * m for m in macs], "o-", color=ORANGE, markersize=4, label="MACs"
    )
    ax.plot(
        [100 * (1 - k) for k in kept],
        [100 * p for p in params],
        "o-",
        color=TEAL,
        markersize=4,
        label="parameters",
    )
    ax.set(
        xlabel="channels removed from every group of ResNet-20, %", ylabel="what is left, %", ylim=(0, 103)
    )
    ax.legend()
    return figure


class Small(nn.Module):
    """A stem, one residual block and a head: small enough to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


def groups() -> Figure:
    """Which dims of which weights are coupled, as `trace` finds it."""
    network = Small()
    found = trace(network, (torch.zeros(1, 3, 8, 8),))
    colour_of = {
        (member.tensor, member.dim): colour
        for group, colour in zip(found.groups.values(), COLOURS, strict=False)
        for member in group.members
    }
    names = [name for name, parameter in network.named_parameters() if parameter.dim() > 1]
    figure = new_figure(7.2, 2.9)
    ax = figure.subplots()
    for at, name in enumerate(names):
        _draw_weight(ax, 2.7 * at, name, tuple(network.get_parameter(name).shape), colour_of)
    ax.set(xlim=(-0.9, 2.7 * len(names) - 0.2), ylim=(-2.6, 2.4), xticks=(), yticks=())
    for group, (at, colour) in zip(found.groups.values(), enumerate(COLOURS), strict=False):
        dims = ", ".join(f"{m.tensor}[{m.dim}]" for m in group.members)
        ax.text(
            -0.8,
            -1.75 - 0.5 * at,
            f"■ {group.name}: {group.size} channels in {dims}",
            color=colour,
            fontsize=7.5,
        )
    ax.grid(visible=False)
    ax.set_frame_on(False)
    return figure


def _draw_weight(
    ax: Axes, x: float, name: str, shape: tuple[int, ...], colour_of: dict[tuple[str, int], str]
) -> None:
    """Draw a weight as a box: rows are its outputs, columns its inputs; a coloured edge is a dim that can shrink."""
    height, width = 0.7 + shape[0] / 10, 0.7 + shape[1] / 14
    low = -height / 2
    ax.add_patch(Rectangle((x, low), width, height, facecolor="#eef3f3", edgecolor="#c7d1d3"))
    for dim, (start, size) in enumerate(
        (((x - 0.16, low), (0.16, height)), ((x, low + height), (width, 0.16)))
    ):
        colour = colour_of.get((name, dim), "#c7d1d3")
        ax.add_patch(Rectangle(start, *size, facecolor=colour, edgecolor="none"))
        where = (x - 0.24, 0.0) if dim == 0 else (x + width / 2, low + height + 0.24)
        align = {"ha": "right", "va": "center"} if dim == 0 else {"ha": "center", "va": "bottom"}
        ax.text(
            *where,
            str(shape[dim]),
            color=colour if (name, dim) in colour_of else SLATE,
            fontsize=8.5,
            **align,
        )
    ax.text(x + width / 2, 0, name.removesuffix(".weight"), ha="center", va="center", fontsize=8.5)
