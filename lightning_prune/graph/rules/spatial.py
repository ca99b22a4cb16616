"""Pooling, resampling, windows: they work on the last dims and leave channels alone."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_prune.graph.refinement import split_product
from lightning_prune.graph.rules.table import Op, Types, freeze_all, frozen, rule
from lightning_prune.graph.types import find, freeze, frozen_type, product

_POOLS = ("adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "max_pool")
_POOLING = [f"{name}{k}d" for name in _POOLS for k in (1, 2, 3)]
_POOLING += [f"max_pool{k}d_with_indices" for k in (1, 2, 3)] + [f"fractional_max_pool{k}d" for k in (2, 3)]
_PADS = [f"{name}_pad{k}d" for name in ("reflection", "replication") for k in (1, 2, 3)]
_UPSAMPLING = ["upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"]
_UPSAMPLING += [f"upsample_nearest{k}d" for k in (1, 2, 3)] + [
    f"_upsample_nearest_exact{k}d" for k in (1, 2, 3)
]
_UPSAMPLING += ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]


@rule(*_POOLING, *_PADS, *_UPSAMPLING)
def resample(op: Op) -> Types | list[Types]:
    """Freeze the last one, two or three dims, old and new."""
    num = next(k for k in (1, 2, 3) if f"{k}d" in op.name)
    types, shape = op.first, op.shape
    kept = len(types) - num
    freeze_all(types[kept:], f"slid over by {op.name}")
    result = [*types[:kept], *frozen(shape[kept:], f"slid over by {op.name}")]
    return result if isinstance(op.output, Tensor) else [result for _ in op.output]


@rule("grid_sampler_2d", "grid_sampler_3d", "grid_sampler")
def grid_sampler(op: Op) -> Types:
    """Sample the last dims at the positions of a grid."""
    grid = op[1]
    assert grid is not None
    freeze_all([*op.first[2:], *grid], "positions of a grid")
    return [*op.first[:2], *frozen(op.shape[2:], "positions of a grid")]


@rule("im2col")
def im2col(op: Op) -> Types:
    """Put each channel's window into the channel dim."""
    batch, channels = op.first[:2]
    freeze_all(op.first[2:], "slid over by unfold")
    window = frozen_type(op.shape[1] // find(channels).size, "window")
    return [batch, product([channels, window]), frozen_type(op.shape[2], "slid over by unfold")]


@rule("col2im")
def col2im(op: Op) -> Types:
    """Put windows back in their places."""
    batch, merged, places = op.first
    channels, window = split_product(merged, find(merged).size // math.prod(op.args[2]))
    freeze_all([window, places], "windows of fold")
    return [batch, channels, *frozen(op.shape[2:], "windows of fold")]


@rule("unfold")
def unfold(op: Op) -> Types:
    """Cut windows out of one dim."""
    d = op.dim(1, "dimension")
    freeze(op.first[d], "cut into windows")
    windows = frozen([op.shape[d], op.shape[-1]], "cut into windows")
    return [*op.first[:d], windows[0], *op.first[d + 1 :], windows[1]]


@rule("pixel_shuffle")
def pixel_shuffle(op: Op) -> Types:
    """Turn blocks of channels into blocks of pixels."""
    *batch, merged, _, _ = op.first
    freeze_all(op.first[-2:], "pixels")
    channels, block = split_product(merged, find(merged).size // op.args[1] ** 2)
    freeze(block, "pixels")
    return [*batch, channels, *frozen(op.shape[-2:], "pixels")]


@rule("pixel_unshuffle")
def pixel_unshuffle(op: Op) -> Types:
    """Turn blocks of pixels into blocks of channels."""
    *batch, channels, _, _ = op.first
    freeze_all(op.first[-2:], "pixels")
    block = frozen_type(op.args[1] ** 2, "pixels")
    return [*batch, product([channels, block]), *frozen(op.shape[-2:], "pixels")]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(op: Op) -> Types:
    """Exchange the two factors of the channels."""
    groups, channels = split_product(op.first[1], op.args[1])
    return [op.first[0], product([channels, groups]), *op.first[2:]]
