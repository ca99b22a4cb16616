"""A DataLoader for tensors in memory that slices whole batches, and goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch: TypeAlias = tuple[Tensor, Tensor]
T = TypeVar("T")


class Pairs(Dataset[Batch]):
    """Inputs and targets in memory; a batch is one slice of each, which spares the collation of single examples.

    Args:
        inputs: (N, ...).
        targets: (N, ...).

    Example:
        >>> pairs = Pairs(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2]))
        >>> pairs.__getitems__([2, 0])
        (tensor([3., 1.]), tensor([2, 0]))
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.targets[chosen]


class Windows(Dataset[Batch]):
    """Consecutive stretches of a text; the target of each token is the next one.

    Args:
        tokens: (N,), integers.
        block_size: length of a stretch, at least 1. What is left over at the end is not used.

    Example:
        >>> Windows(torch.arange(7), block_size=3).__getitems__([0, 1])
        (tensor([[0, 1, 2],
                [3, 4, 5]]), tensor([[1, 2, 3],
                [4, 5, 6]]))
    """

    def __init__(self, tokens: Tensor, block_size: int) -> None:
        self.tokens, self.block_size = tokens, block_size

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.block_size

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        starts = torch.as_tensor(indices)[:, None] * self.block_size
        stretches = self.tokens[starts + torch.arange(self.block_size + 1)].long()
        return stretches[:, :-1], stretches[:, 1:]


def as_sliced(batch: T) -> T:
    """Leave a batch as the data set has sliced it: the `collate_fn` of these data sets."""
    return batch


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader that Lightning can save and restore within an epoch.

    It counts the batches that it hands out. After a resume it skips as many, in the epoch in which they were counted;
    the order has to be a function of the epoch alone, as `DistributedSampler(shuffle=True, seed=...)` makes it.
    """

    num_done = 0
    _resumed: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        num_skipped = 0
        if self._resumed is not None:
            epoch, num_done = self._resumed
            num_skipped = num_done if epoch == self._epoch else 0
            self._resumed = None
        self.num_done = num_skipped
        for batch in islice(super().__iter__(), num_skipped, None):
            self.num_done += 1
            yield batch

    @property
    def _epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were handed out."""
        return {"epoch": self._epoch, "num_done": self.num_done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind the batches of `state_dict`, if the next epoch to be read is the same one."""
        self._resumed = state_dict["epoch"], state_dict["num_done"]
