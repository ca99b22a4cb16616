"""The pictures of the nouns: curves, windows, pieces, scopes, maskings and solvers."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

import lightning_prune as lp
from drawing.base import KEPT, ORANGE, SLATE, TEAL, accuracy, digits, fit, fresh, new_figure
from lightning_prune.core.windows import Window


def schedules() -> Figure:
    """The curves."""
    members = {
        "Constant()": lp.Constant(),
        "Linear()": lp.Linear(),
        "Polynomial()": lp.Polynomial(),
        "Cosine()": lp.Cosine(),
        "Exponential()": lp.Exponential(),
        "OneCycle()": lp.OneCycle(),
        "Steps(4)": lp.Steps(4),
        "Alternating()": lp.Alternating(),
    }
    x = np.linspace(0, 1, 121)
    figure = new_figure(7.2, 3.2)
    axes = figure.subplots(2, 4, sharex=True, sharey=True).flat
    for ax, (name, schedule) in zip(axes, members.items(), strict=True):
        y = [schedule(float(p)) for p in x]
        ax.plot(x, y, linewidth=1.8)
        ax.fill_between(x, y, alpha=0.12)
        ax.set(title=name, ylim=(-0.03, 1.08), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    figure.supxlabel("progress through the window", fontsize=9)
    figure.supylabel("fraction of the target", fontsize=9)
    return figure


def window() -> Figure:
    """Where the updates fall."""
    schedule, num_steps = lp.Polynomial(), 1000
    figure = new_figure(7.2, 2.3)
    ax = figure.subplots()
    for chosen, colour in ((Window(), TEAL), (Window(start=0.2, end=0.5, every=0.05), ORANGE)):
        steps = chosen.resolve(num_steps=num_steps, steps_per_epoch=100)
        fired = [s for s in range(steps.start, steps.end + 1) if steps.fires(s)]
        y = [0.9 * schedule(steps.progress(s)) for s in fired]
        x = [s / num_steps for s in fired]
        before = [0.0] if fired[0] else []
        ax.step(
            [*before, *x, 1.0], [*(0.0 for _ in before), *y, y[-1]], where="post", color=colour, linewidth=1.2
        )
        ax.plot(x, y, ".", color=colour, markersize=5, label=str(chosen))
    ax.set(xlabel="fraction of the run", ylabel="sparsity", ylim=(-0.03, 1.0), xlim=(0, 1))
    ax.legend(loc="lower right")
    return figure


def granularities() -> Figure:
    """The same layer, half of it gone, in pieces of several shapes."""
    chosen: dict[str, dict[str, Any]] = {
        "Weight()": {"granularity": lp.Weight()},
        "NofM(2, 4)": {"scope": lp.NofM(2, 4), "sparsity": None},
        "PerRow()": {"scope": lp.PerRow()},
        "Block(4, 4)": {"granularity": lp.Block(4, 4)},
        "Slice(0): rows": {"granularity": lp.Slice(0)},
        "Slice(1): columns": {"granularity": lp.Slice(1)},
    }
    figure = new_figure(7.2, 3.0)
    axes = figure.subplots(2, 3).flat
    for ax, (title, options) in zip(axes, chosen.items(), strict=True):
        network = fresh("MLP")
        lp.prune(network, **{"sparsity": 0.5, "include": ["hidden.3*"], **options})
        weight = network.get_parameter("hidden.3.weight").detach().abs()[:32, :64]
        ax.imshow(weight.sqrt(), cmap=KEPT, vmin=0, vmax=0.55, interpolation="nearest")
        ax.set(title=title, xticks=(), yticks=())
        ax.grid(visible=False)
    axes = list(figure.axes)
    axes[3].set_xlabel("inputs →", fontsize=8, color=SLATE, loc="left")
    axes[3].set_ylabel("outputs →", fontsize=8, color=SLATE, loc="bottom")
    return figure


def scopes() -> Figure:
    """How much each layer keeps, when 90 % of all goes."""
    chosen = {"Local": lp.Local(), "Global": lp.Global(), "ERK": lp.ERK(), "LAMP": lp.LAMP()}
    figure = new_figure(7.2, 2.7)
    ax = figure.subplots()
    for at, (name, scope) in enumerate(chosen.items()):
        masks = lp.prune(fresh(), sparsity=0.9, scope=scope)
        density = [float(mask.float().mean()) for mask in masks.values()]
        x = np.arange(len(density)) + 0.2 * (at - 1.5)
        ax.bar(x, [100 * d for d in density], width=0.18, label=f"{name}()")
    names = [f"{n.removesuffix('.weight')}\n{m.numel():,} weights" for n, m in masks.items()]
    ax.set(xticks=range(len(names)), xticklabels=names, ylabel="kept, %")
    ax.grid(visible=False, axis="x")
    ax.legend(ncols=2)
    return figure


def masking() -> Figure:
    """What becomes of one run's pruned weights under each masking: how many places were ever exchanged."""
    figure = new_figure(7.2, 2.6)
    ax = figure.subplots()
    for name, masking_ in (
        ("None", None),
        ("Dormant()", lp.Dormant()),
        ("StraightThrough()", lp.StraightThrough()),
    ):
        watcher = _Comebacks()
        fit(
            [lp.TrainTimePruning(sparsity=0.9, masking=masking_, report=False), watcher],
            network="MLP",
            sizes=(64, 128, 64, 10),
            lr=3e-3,
        )
        ax.plot(watcher.steps, watcher.counts, label=f"masking={name}")
    ax.set(xlabel="training step", ylabel="pruned weights\nthat came back, so far")
    ax.legend()
    return figure


class _Comebacks(L.Callback):
    """Counts weights that are kept again after they were pruned."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.steps: list[int] = []
        self.counts: list[int] = []
        self.total = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        pruning = next(cb for cb in trainer.callbacks if isinstance(cb, lp.TrainTimePruning))
        now = {name: mask.clone() for name, mask in pruning.masks.items()}
        self.total += sum(int((mask & ~self.before[name]).sum()) for name, mask in now.items() if self.before)
        self.before = now
        self.steps.append(trainer.global_step)
        self.counts.append(self.total)


def solvers() -> Figure:
    """One-shot pruning with and without weights that make up for those that go."""
    x, y = digits("train")
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 1024, 64)]
    levels = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
    figure = new_figure(7.2, 2.6)
    ax = figure.subplots()
    for name, solver in (
        ("LeastSquares()", lp.LeastSquares()),
        ("SparseGPT()", lp.SparseGPT()),
        ("None", None),
    ):
        found = []
        for sparsity in levels:
            network = fresh("MLP")
            if sparsity:
                lp.prune(
                    network, sparsity, scope=lp.Local(), solver=solver, batches=batches, exclude=["head"]
                )
            found.append(100 * accuracy(network))
        ax.plot(levels, found, "o-", markersize=4, label=f"solver={name}")
    ax.set(xlabel="sparsity, without any training afterwards", ylabel="test accuracy, %")
    ax.legend()
    return figure
