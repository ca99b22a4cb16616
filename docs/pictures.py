"""Draws the pictures of the pages from real runs on a CPU: `python docs/pictures.py [name ...]`, about two minutes.

Each public function returns a figure and is named as its file in `docs/pictures`. Networks are trained, pruned and
traced here; nothing is made up but the words of the labels.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.examples.data import Digits
from lightning_prune.examples.networks import ResNet20
from lightning_prune.examples.tasks import Classifier
from lightning_prune.graph import trace
from lightning_prune.model.calls import Call
from lightning_prune.model.cost import measure

FOLDER = ROOT / "docs" / "pictures"
TEAL, ORANGE, SLATE, GOLD, PLUM, SKY = "#14746f", "#e07a2f", "#5b6770", "#d9a404", "#7b4b94", "#3d8fd1"
COLOURS = (TEAL, ORANGE, SKY, PLUM, GOLD, SLATE)
STYLE = {
    "axes.edgecolor": "#9aa5ab",
    "axes.grid": True,
    "axes.labelcolor": "#2f3a40",
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.dpi": 110,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "lightning_prune",
    "xtick.color": "#5b6770",
    "ytick.color": "#5b6770",
}
KEPT = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#9fd3c7", TEAL, "#06302d"])


def _figure(width: float = 7.2, height: float = 3.0) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _fit(callbacks: Sequence[L.Callback] = (), epochs: int = 10, seed: int = 0, **options: Any) -> Classifier:
    """Train a network on the embedded digits."""
    L.seed_everything(seed, verbose=False)
    task = Classifier(**{"network": "ConvNet", "lr": 5e-3, **options})
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, Digits())
    return task


@cache
def _trained(network: str = "ConvNet") -> nn.Module:
    options = {"sizes": (64, 128, 64, 10)} if network == "MLP" else {}
    return _fit(network=network, **options).network.eval()


def _fresh(network: str = "ConvNet") -> nn.Module:
    return copy.deepcopy(_trained(network))


@cache
def _digits(part: str = "test") -> tuple[Tensor, Tensor]:
    data = Digits(batch_size=512)
    data.setup("fit")
    loader = data.test_dataloader() if part == "test" else data.train_dataloader()
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _accuracy(network: nn.Module) -> float:
    x, y = _digits()
    with torch.no_grad():
        return float((network.eval()(x).argmax(1) == y).float().mean())


def ramp() -> Figure:
    """What a run with one callback does: sparsity rises, and accuracy stays."""
    pruning = lp.TrainTimePruning(sparsity=0.9, report=False)
    monitor = lp.SparsityMonitor(latency=False, show=False, folder=ROOT / "build" / "pictures")
    _fit([pruning, monitor], epochs=14)
    report = monitor.report
    assert report is not None
    last = report.evaluations[-1].step
    steps = [u.step / last for u in report.updates]
    figure = _figure(7.2, 2.9)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.step([*steps, 1], [*(u.achieved for u in report.updates), report.updates[-1].achieved], where="post")
    left.fill_between([*steps, 1], [*(u.achieved for u in report.updates), 0.9], step="post", alpha=0.12)
    seen = [e.step / last for e in report.evaluations]
    left.plot(seen, [e.metrics["val/acc"] for e in report.evaluations], "o-", color=ORANGE, markersize=3.5)
    left.text(0.30, 0.60, "sparsity", color=TEAL)
    left.text(0.55, 1.05, "validation accuracy", color=ORANGE)
    left.set(xlabel="fraction of the run", ylim=(0, 1.14), xlim=(0, 1.01))
    names = [layer.name.removeprefix("network.").removesuffix(".weight") for layer in report.layers]
    at = np.arange(len(names))[::-1]
    right.barh(at, [layer.params for layer in report.layers], color="#dfe7e8")
    right.barh(at, [layer.nonzeros for layer in report.layers], color=TEAL)
    for y, layer in zip(at, report.layers, strict=True):
        text = f" {layer.nonzeros:,} of {layer.params:,}"
        right.text(layer.params, y, text, va="center", fontsize=8, color=SLATE)
    right.set(
        yticks=at, yticklabels=names, xlabel="weights that stay", xlim=(0, 14500), xticks=(0, 5000, 10000)
    )
    right.grid(visible=False, axis="y")
    return figure


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
    figure = _figure(7.2, 3.2)
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
    from lightning_prune.core.windows import Window

    schedule, num_steps = lp.Polynomial(), 1000
    figure = _figure(7.2, 2.3)
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
    figure = _figure(7.2, 3.0)
    axes = figure.subplots(2, 3).flat
    for ax, (title, options) in zip(axes, chosen.items(), strict=True):
        network = _fresh("MLP")
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
    figure = _figure(7.2, 2.7)
    ax = figure.subplots()
    for at, (name, scope) in enumerate(chosen.items()):
        masks = lp.prune(_fresh(), sparsity=0.9, scope=scope)
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
    figure = _figure(7.2, 2.6)
    ax = figure.subplots()
    for name, masking_ in (
        ("None", None),
        ("Dormant()", lp.Dormant()),
        ("StraightThrough()", lp.StraightThrough()),
    ):
        watcher = _Comebacks()
        _fit(
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
    x, y = _digits("train")
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 1024, 64)]
    levels = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
    figure = _figure(7.2, 2.6)
    ax = figure.subplots()
    for name, solver in (
        ("LeastSquares()", lp.LeastSquares()),
        ("SparseGPT()", lp.SparseGPT()),
        ("None", None),
    ):
        found = []
        for sparsity in levels:
            network = _fresh("MLP")
            if sparsity:
                lp.prune(
                    network, sparsity, scope=lp.Local(), solver=solver, batches=batches, exclude=["head"]
                )
            found.append(100 * _accuracy(network))
        ax.plot(levels, found, "o-", markersize=4, label=f"solver={name}")
    ax.set(xlabel="sparsity, without any training afterwards", ylabel="test accuracy, %")
    ax.legend()
    return figure


def learning_rate() -> Figure:
    """The same pruning with two learning-rate schedules: what the rate is while the sparsity rises."""
    from lightning_prune.examples.settings import Optimization

    ways = {
        "constant_then_cosine": ("constant, then a cosine", TEAL),
        "cosine": ("cosine from the start", ORANGE),
    }
    sparsities, x = (0.95, 0.98), np.linspace(0, 1, 121)
    figure = _figure(7.2, 2.7)
    left, right = figure.subplots(1, 2)
    left.plot(x, [lp.Polynomial()(min(p / 0.7, 1)) for p in x], ":", color=SLATE, label="sparsity / target")
    for at, (way, (label, colour)) in enumerate(ways.items()):
        factor = Optimization("adam", 5e-3, 0.0, 0.9, way).lr_factor
        left.plot(x, [factor(p) for p in x], color=colour, label=label)
        for level, sparsity in enumerate(sparsities):
            runs = [_pruned_accuracy(sparsity, way, seed) for seed in range(3)]
            place = level + 0.2 * (at - 0.5)
            right.plot([place] * len(runs), runs, "o", color=colour, alpha=0.4, markersize=4)
            right.plot([place], [np.mean(runs)], "_", color=colour, markersize=20, markeredgewidth=2.5)
            print(f"learning_rate: {way} at {sparsity}: {np.mean(runs):.2f} from {np.round(runs, 2)}")
    left.set(xlabel="fraction of the run", ylabel="learning rate / peak", ylim=(-0.03, 1.45))
    left.legend(fontsize=7.5, loc="upper right")
    labels = [f"{sparsity:.0%} sparse" for sparsity in sparsities]
    right.set(xticks=range(len(labels)), xticklabels=labels, ylabel="test accuracy, %", xlim=(-0.5, 1.5))
    return figure


def _pruned_accuracy(sparsity: float, lr_schedule: str, seed: int) -> float:
    task = _fit([lp.TrainTimePruning(sparsity, report=False)], epochs=10, seed=seed, lr_schedule=lr_schedule)
    return 100 * _accuracy(task.network)


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
    figure = _figure(7.2, 2.8)
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
    figure = _figure(7.2, 2.9)
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


def step() -> Figure:
    """What happens in one training step, in the order in which it was seen to happen."""
    seen = _events()
    texts = {
        "forward": ("forward", "reads weights,\nzero where\npruned"),
        "backward": ("backward", "gradients of\nall weights"),
        "before": ("criterion", "notes gradients\nif it needs them"),
        "optimizer": ("optimizer", "momentum moves\npruned weights"),
        "masked": ("masks", "in the optimizer's\nown hook:\nzero again"),
        "end": ("averages", "EMA and SWA\ncopies are\nmasked too"),
    }
    figure = _figure(7.6, 1.9)
    ax = figure.subplots()
    for at, (event, moved) in enumerate(seen):
        title, text = texts[event]
        colour = ORANGE if moved else TEAL
        box = FancyBboxPatch(
            (1.95 * at, 0), 1.6, 1.35, boxstyle="round,pad=0.06", facecolor="#f4f8f8", edgecolor=colour
        )
        ax.add_patch(box)
        ax.text(1.95 * at + 0.8, 1.1, title, ha="center", fontsize=8, color=colour, weight="bold")
        ax.text(1.95 * at + 0.8, 0.5, text, ha="center", va="center", fontsize=7.2, color="#2f3a40")
        ax.text(1.95 * at + 0.8, -0.42, f"{moved:,}", ha="center", fontsize=9, color=colour)
        if at:
            ax.annotate(
                "",
                (1.95 * at - 0.08, 0.68),
                (1.95 * at - 0.27, 0.68),
                arrowprops={"arrowstyle": "->", "color": SLATE},
            )
    ax.text(-0.1, -0.85, "pruned weights that are not zero after it", fontsize=8, color=SLATE)
    ax.set(xlim=(-0.15, 1.95 * len(seen) - 0.2), ylim=(-1.0, 1.5), xticks=(), yticks=())
    ax.grid(visible=False)
    ax.set_frame_on(False)
    return figure


def _events() -> list[tuple[str, int]]:
    """Watch the last step of a run with momentum and weight decay."""
    events: list[tuple[str, int]] = []
    pruning = lp.TrainTimePruning(sparsity=0.9, report=False, window=lp.Window(end=0.5))

    class Watched(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            note("forward", start=True)
            return super().forward(x)

        def on_after_backward(self) -> None:
            note("backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            note("before")

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
            optimizer.register_step_post_hook(lambda *_: note("optimizer"))  # before ours: it was there first
            return optimizer

        def on_train_start(self) -> None:  # behind ours: callbacks have hooked on by now
            self.optimizers().optimizer.register_step_post_hook(lambda *_: note("masked"))

        def on_train_batch_end(self, *_: Any) -> None:
            note("end")

    def note(event: str, start: bool = False) -> None:
        if start:
            events.clear()
        events.append((event, moved()))

    def moved() -> int:
        weights = pruning.pruner.targets if pruning.pruner else {}
        return sum(int(((weights[n] != 0) & ~mask).sum()) for n, mask in pruning.masks.items())

    L.seed_everything(0, verbose=False)
    task = Watched("ConvNet")
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(task, Digits())
    return events


PICTURES: dict[str, Callable[[], Figure]] = {
    function.__name__: function
    for function in (
        *(ramp, schedules, window, granularities, scopes, masking, solvers, learning_rate),
        *(shrinking, groups, step),
    )
}
RASTER = ("granularities",)
"""Pictures of many small squares, which are smaller as pixels."""


def file_of(name: str) -> Path:
    """Return where a picture lies."""
    return FOLDER / f"{name}.{'png' if name in RASTER else 'svg'}"


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draw a picture into a folder."""
    path = folder / file_of(name).name
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
        PICTURES[name]().savefig(path, **options)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for chosen in sys.argv[1:] or PICTURES:
        print(draw(chosen).relative_to(ROOT))
