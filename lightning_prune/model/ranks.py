"""What several processes have to agree on: the same masks, and the same account of each update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from lightning_prune.core.checksums import checksum, text_checksum
from lightning_prune.core.types import Masks


def is_distributed() -> bool:
    """Whether there are several processes, which find what they find on batches of their own."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_agreement(masks: Masks, facts: Mapping[str, object], place: int = 0) -> None:
    """Refuse to go on where processes have found different masks; to be called on all of them.

    Each sends a checksum of each mask, eight bytes, and no mask.

    Args:
        masks: of this process.
        facts: what else has to be the same, by name.
        place: which part of the masks lies here; only processes with the same part compare their masks.

    Raises:
        ValueError: a mask, the masks' names or a fact differs. It is raised on all processes alike.
    """
    if not is_distributed():
        return
    device = next(iter(masks.values())).device if masks else _device()
    shared = {"the names of the pruned weights": list(masks), **facts}
    heads = from_all([place, *(text_checksum(repr(fact)) for fact in shared.values())], device)
    _compare(list(shared), [(0, row[1:]) for row in heads])
    if not masks:
        return
    found = from_all([int(checksum(mask)) for mask in masks.values()], device)
    _compare(
        [f"`{name}`" for name in masks], [(head[0], row) for head, row in zip(heads, found, strict=True)]
    )


def _compare(names: Sequence[str], rows: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Compare the row of each rank with that of the first rank of its place."""
    first: dict[int, tuple[int, Sequence[int]]] = {}
    for rank, (place, row) in enumerate(rows):
        reference, expected = first.setdefault(place, (rank, row))
        differing = [n for n, a, b in zip(names, row, expected, strict=True) if a != b]
        if differing:
            where = differing[0] + (f", and {len(differing) - 1} more" if len(differing) > 1 else "")
            raise ValueError(
                f"`masks` are the same on all processes, but ranks {reference} and {rank} differ in {where}. A "
                "criterion or scope draws random numbers without a shared seed or reads what one process alone sees, "
                "or the weights had drifted apart before."
            )


def from_all(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the whole numbers of each process, as many of each, in the order of the ranks."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    rows: list[Tensor] = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, own)
    return [row.tolist() for row in rows]


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
