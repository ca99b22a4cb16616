"""Where the k-th largest score probably lies: a sample of all scores says so. What cannot be ranked is refused here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_prune.core.across import total_of
from lightning_prune.core.keys import Bracket, key_of
from lightning_prune.core.types import Name, Scores, across_of, pieces_of, shapes_of

NUM_SAMPLES = 1 << 17
MARGIN = 4.0  # of the bracket around the sample's estimate, in standard deviations


def sample_of(scores: Scores, stride: int) -> tuple[Tensor, torch.dtype]:
    """Return every `stride`-th score of all, descending, and the dtype that holds each score exactly."""
    total = sum(math.prod(shape) for shape in shapes_of(scores).values())
    # one buffer: small tensors that stay, made between large ones that go, leave memory in pieces that nobody can use
    sample, place = torch.empty(0, dtype=torch.float64), 0
    start, dtype = 0, torch.float32
    num_nan: dict[Name, Tensor | int] = dict.fromkeys(scores, 0)
    for name in scores:
        for piece in pieces_of(scores, name):
            if not len(sample):
                sample = sample.new_empty(total // stride + 1, device=counted_on(piece))
            chosen = piece.reshape(-1)[start::stride]
            sample[place : place + len(chosen)] = chosen
            place += len(chosen)
            dtype = torch.promote_types(dtype, piece.dtype)
            start = (start - piece.numel()) % stride
            num_nan[name] += num_nan_of(piece)
            del piece, chosen  # gone before the next one is computed
    refuse_nan(scores, [int(number) for number in num_nan.values()])
    return sample[:place].sort(descending=True).values, dtype


def guess(sample: Tensor, share: float, is_exact: bool, bounds: Bracket, dtype: torch.dtype) -> Bracket:
    """Guess where a share of the scores ends, from the top: around that of the sample, which may be all of them."""
    if not len(sample):
        return Bracket(bounds.high, bounds.low)  # of nothing: it leaves the guess to other processes
    rank = share * len(sample)
    rank = round(rank) if is_exact else rank
    margin = 0 if is_exact else 1 + MARGIN * math.sqrt(rank * max(0.0, 1 - rank / len(sample)))
    first, last = math.floor(rank - margin) - 1, math.ceil(rank + margin) - 1
    low = key_of(float(sample[last]), dtype) if last < len(sample) else bounds.low
    return Bracket(low, key_of(float(sample[first]), dtype) if 0 <= first < len(sample) else bounds.high)


def counted_on(scores: Tensor) -> torch.device:
    """Return where to count scores: on their GPU, which the processor then seldom waits for, all others on the CPU."""
    return scores.device if scores.is_cuda else torch.device("cpu")


def num_nan_of(tensor: Tensor) -> Tensor | int:
    """Return how many entries are NaN; of a tensor on a GPU the count stays there."""
    if tensor.is_cuda:
        return tensor.isnan().sum()
    return 0 if bool(tensor.sum().isfinite()) else int(tensor.isnan().sum())


def refuse_nan(scores: Scores, counts: list[int]) -> None:
    """Refuse scores that are NaN, on all processes alike."""
    found = zip(shapes_of(scores).items(), total_of(across_of(scores), counts), strict=True)
    for (name, shape), num_nan in found:
        if num_nan:
            raise ValueError(
                f"`{name}` has scores that can be ranked, but got {num_nan} NaN in shape {shape}: look at its weights "
                "and at what the criterion reads (gradients, activations)."
            )
