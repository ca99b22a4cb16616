"""How the examples are loaded and trained: plain settings, checked when they are built. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_prune.core.checks import check_choice, check_count, check_positive, check_range

OPTIMIZERS = ("adam", "adamw", "sgd")
LR_SCHEDULES = ("constant_then_cosine", "cosine", "constant")
DECAY_START = 0.7
"""Where "constant_then_cosine" begins to decay, as a fraction of the run: where the default pruning window ends."""


@dataclass(frozen=True)
class Loading:
    """How a data module makes batches.

    Args:
        batch_size: at least 1, on each process.
        num_workers: processes that slice; 0 is fastest for data in memory.
        pin_memory: whether batches are put into pinned memory, for training on a GPU.
        seed: order of the training examples, at least 0.

    Raises:
        ValueError: a value out of its range.
    """

    batch_size: int
    num_workers: int
    pin_memory: bool
    seed: int

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, minimum=1)
        check_count("num_workers", self.num_workers, minimum=0)
        check_count("seed", self.seed, minimum=0)


@dataclass(frozen=True)
class Optimization:
    """How a task is optimized.

    Args:
        optimizer: "adam", "adamw" or "sgd".
        lr: learning rate at the start, above 0.
        weight_decay: at least 0.
        momentum: of SGD, in [0, 1).
        lr_schedule: "constant"; "cosine", from the start to 0 at the end; or "constant_then_cosine", constant for the
            first 70 % of the run, in which sparsity rises by default, and a cosine to 0 after.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> optimization = Optimization(optimizer="sgd", lr=0.1)
        >>> [round(optimization.lr_factor(p), 3) for p in (0.0, 0.7, 0.85, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    lr_schedule: str = "constant_then_cosine"

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_positive("lr", self.lr)
        check_range("weight_decay", self.weight_decay, 0.0, math.inf, "a number of at least 0")
        check_range("momentum", self.momentum, 0.0, 1.0, "a number in [0, 1)", open_end=True)
        check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)

    def lr_factor(self, progress: float) -> float:
        """Return what the learning rate is multiplied with, at a progress in [0, 1] through the run."""
        if self.lr_schedule == "constant":
            return 1.0
        start = DECAY_START if self.lr_schedule == "constant_then_cosine" else 0.0
        decayed = min(max(0.0, (progress - start) / (1.0 - start)), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * decayed))
