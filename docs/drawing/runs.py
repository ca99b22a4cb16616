"""The pictures of runs: how one goes, what the learning rate does to it, and one step of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

import lightning_prune as lp
from drawing.base import ORANGE, SLATE, TEAL, accuracy, fit, new_figure
from lightning_prune.examples.data import Digits
from lightning_prune.examples.settings import Optimization
from lightning_prune.examples.tasks import Classifier


def ramp() -> Figure:
    """What a run with one callback does: sparsity rises, and accuracy stays."""
    pruning = lp.TrainTimePruning(sparsity=0.9, report=False)
    monitor = lp.SparsityMonitor(
        latency=False, show=False, folder=Path(__file__).parents[2] / "build" / "pictures"
    )
    fit([pruning, monitor], epochs=14)
    report = monitor.report
    assert report is not None
    last = report.evaluations[-1].step
    steps = [u.step / last for u in report.updates]
    figure = new_figure(7.2, 2.9)
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


def learning_rate() -> Figure:
    """The same pruning with two learning-rate schedules: what the rate is while the sparsity rises."""
    ways = {
        "constant_then_cosine": ("constant, then a cosine", TEAL),
        "cosine": ("cosine from the start", ORANGE),
    }
    sparsities, x = (0.95, 0.98), np.linspace(0, 1, 121)
    figure = new_figure(7.2, 2.7)
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
    task = fit([lp.TrainTimePruning(sparsity, report=False)], epochs=10, seed=seed, lr_schedule=lr_schedule)
    return 100 * accuracy(task.network)


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
    figure = new_figure(7.6, 1.9)
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
