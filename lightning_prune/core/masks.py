"""Masks: how they are made, measured, compared and stored. The whole algorithm is `compute_masks`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_prune.core.types import Granularity, Masks, Name, Scope, Scores, Shape


class PackedMask(TypedDict):
    """A mask at eight weights a byte, safe under `torch.load(weights_only=True)`."""

    shape: list[int]
    bits: Tensor


def compute_masks(
    scores: Scores, shapes: Mapping[Name, Shape], sparsity: float, *, granularity: Granularity, scope: Scope
) -> Masks:
    """Let the groups compete and return masks of the weights.

    Args:
        scores: of groups, as `group_scores` gives them.
        shapes: of the weights.
        sparsity: fraction of the groups to remove, in [0, 1).
        granularity: expands group masks to masks of weights.
        scope: decides which groups stay.

    Example:
        >>> from lightning_prune import Global, Slice
        >>> scores = {"a": torch.tensor([2.0, 1.0])}
        >>> compute_masks(scores, {"a": (2, 2)}, 0.5, granularity=Slice(dim=0), scope=Global())
        {'a': tensor([[ True,  True],
                [False, False]])}
    """
    return {name: granularity.expand(mask, shapes[name]) for name, mask in scope(scores, sparsity).items()}


def sparsity_of(masks: Mapping[Name, Tensor]) -> float:
    """Return the fraction of the weights that masks remove, in [0, 1]; 0 where there is no mask.

    Example:
        >>> sparsity_of({"a": torch.tensor([True, False, False]), "b": torch.tensor([True])})
        0.5
    """
    total = sum(mask.numel() for mask in masks.values())
    return 1.0 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0


def overlap(first: Mapping[Name, Tensor], second: Mapping[Name, Tensor]) -> float:
    """Return the intersection over the union of what two sets of masks keep, in [0, 1]; 1 where they are equal.

    Raises:
        ValueError: they are not masks of the same parameters.

    Example:
        >>> overlap({"a": torch.tensor([True, True])}, {"a": torch.tensor([True, False])})
        0.5
    """
    for name in first.keys() ^ second.keys():
        raise ValueError(f"`second` has masks of the same parameters as `first`, but only one has `{name}`.")
    for name, mask in second.items():
        check_mask(name, mask, tuple(first[name].shape))
    both = sum(int((first[name] & second[name]).sum()) for name in first)
    either = sum(int((first[name] | second[name]).sum()) for name in first)
    return both / either if either else 1.0


def check_mask(name: Name, mask: Any, shape: Shape) -> None:
    """Refuse what is no mask of a weight of `shape`.

    Raises:
        ValueError: no boolean tensor, or one of another shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        got = (
            f"{mask.dtype} of shape {tuple(mask.shape)}"
            if isinstance(mask, Tensor)
            else f"{type(mask).__name__}"
        )
        raise ValueError(
            f"`{name}`: a mask is a boolean tensor of the weight's shape {tuple(shape)}, but got {got}."
        )


def pack(mask: Tensor) -> PackedMask:
    """Store a mask at eight weights a byte.

    Example:
        >>> pack(torch.tensor([True, False, True]))["bits"]
        tensor([5], dtype=torch.uint8)
    """
    flat = mask.detach().cpu().flatten()
    padded = torch.zeros(math.ceil(flat.numel() / 8) * 8, dtype=torch.uint8)
    padded[: flat.numel()] = flat
    bits = padded.view(-1, 8)
    for place in range(1, 8):
        bits[:, 0] |= bits[:, place] << place
    return {"shape": list(mask.shape), "bits": bits[:, 0].clone()}


def unpack(name: Name, packed: PackedMask) -> Tensor:
    """Restore a mask from its bits.

    Raises:
        ValueError: the number of bytes does not fit the shape.

    Example:
        >>> unpack("a", pack(torch.tensor([True, False, True])))
        tensor([ True, False,  True])
    """
    shape, bits = packed["shape"], packed["bits"]
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != math.ceil(size / 8):
        raise ValueError(
            f"`{name}`: a mask of shape {tuple(shape)} is stored in {math.ceil(size / 8)} bytes, "
            f"but got {bits.numel()}."
        )
    places = torch.arange(8, dtype=torch.uint8)
    return (bits.unsqueeze(1) >> places & 1).bool().flatten()[:size].view(shape)
