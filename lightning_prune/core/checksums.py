"""A number for a mask, by which processes can tell cheaply whether theirs is the same."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

LENGTH = 1 << 16  # words of eight weights that are multiplied at a time
FACTOR = 0x5851F42D4C957F2D  # odd, so that no chunk is lost when those behind it are added


def checksum(mask: Tensor) -> Tensor:
    """Return an int64 scalar on the mask's device: equal for equal masks, and by chance once in 2^64 for others.

    Eight weights are read as one word, words are multiplied by random numbers of their places and summed up modulo
    2^64. It costs about as much as one pass over the mask, and no more memory than a chunk.

    Args:
        mask: boolean, of any shape; the shape does not count.

    Example:
        >>> first, second = torch.tensor([True, False, True]), torch.tensor([True, True, False])
        >>> bool(checksum(first) == checksum(first.clone())), bool(checksum(first) == checksum(second))
        (True, False)
    """
    octets = mask.detach().reshape(-1).view(torch.uint8)
    if (rest := -octets.numel() % 8) or octets.storage_offset() % 8:
        octets = torch.cat([octets, octets.new_zeros(rest)])
    total = torch.zeros((), dtype=torch.int64, device=mask.device)
    factors = _factors(mask.device)
    for words in octets.view(torch.int64).split(LENGTH):
        total = total * FACTOR + (words * factors[: len(words)]).sum()
    return total


def text_checksum(text: str) -> int:
    """Return a number of 64 bits for a text.

    Example:
        >>> text_checksum("a") == text_checksum("b")
        False
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    low = torch.iinfo(torch.int64).min
    return (torch.randint(low, -low - 1, (LENGTH,), generator=generator) | 1).to(device)
