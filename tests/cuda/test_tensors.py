"""Masks and selection on a GPU are what they are on a CPU, bit for bit, and nothing waits for them."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_prune import ERK, LAMP, Local, PerRow
from lightning_prune.core.selection import keep_top, keep_top_rows
from lightning_prune.model import fused
from lightning_prune.model.apply import apply_masks_
from tests.model.test_apply import DTYPES, SPECIAL

SHAPES = [(3,), (70, 130), (), (0, 4), (4096,), (300, 4097), (6, 5, 3, 3)]


@contextmanager
def no_waiting():
    """Let what waits for the device be an error."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that this is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def drawn(dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    values = [
        torch.tensor(SPECIAL, dtype=dtype)[torch.randint(0, 8, shape, generator=draw)] for shape in SHAPES
    ]
    return values, [torch.rand(shape, generator=draw) > 0.5 for shape in SHAPES]


@pytest.mark.parametrize("way", ["one kernel", "torch's loop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_applied_as_on_a_cpu(device, dtype, way, monkeypatch):
    if way == "torch's loop":
        monkeypatch.setattr(fused, "_works", lambda device: False)
    values, masks = drawn(dtype)
    on_cpu, on_gpu = [v.clone() for v in values], [v.to(device) for v in values]
    assert fused._works(on_gpu[0].device) == (way == "one kernel")
    apply_masks_(on_cpu, masks)
    masks = [mask.to(device) for mask in masks]
    apply_masks_(on_gpu, masks)
    with no_waiting():
        apply_masks_(on_gpu, masks)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[on_cpu[0].element_size()]
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(one.view(integer), other.cpu().view(integer))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        lambda w: torch.stack([w, w], -1)[..., 0],
        lambda w: torch.cat([torch.zeros(1, 6, 3, 3, device=w.device), w])[1:],
    ],
    ids=["channels-last", "transposed", "strided", "a view that begins anywhere"],
)
def test_any_strides(device, arrange):
    values, mask = torch.randn(5, 6, 3, 3, device=device), torch.rand(5, 6, 3, 3, device=device) > 0.5
    weight = arrange(values.clone())
    apply_masks_([weight], [mask])
    assert torch.equal(weight, values * mask)


def test_masks_of_many_calls_and_streams_come_after_the_writes_of_their_own(device):
    """Each stream has a slow write before the masks, and a read behind them; nothing else orders them."""
    torch.manual_seed(0)
    masks = [torch.rand(shape, device=device) > 0.5 for shape in SHAPES]
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    torch.cuda.synchronize()
    for turn in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                weights = [torch.zeros(shape, device=device) for shape in SHAPES]
                torch.cuda._sleep(2_000_000)
                for weight in weights:
                    weight.fill_(turn + 1.0)
                apply_masks_(weights, masks)
                found.append((turn + 1.0, [weight.clone() for weight in weights]))
    torch.cuda.synchronize()
    for value, weights in found:
        assert all(torch.equal(w, m * value) for w, m in zip(weights, masks, strict=True))


def test_a_graph_masks_what_weights_and_masks_hold_when_it_is_replayed(device):
    weights = [torch.ones(shape, device=device) for shape in SHAPES]
    masks = [torch.ones(shape, device=device, dtype=torch.bool) for shape in SHAPES]
    apply_masks_(weights, masks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply_masks_(weights, masks)
    fused.table_of.cache_clear()
    for seed in range(3):
        torch.manual_seed(seed)
        for weight, mask in zip(weights, masks, strict=True):
            weight.fill_(seed + 1.0)
            mask.copy_(torch.rand(mask.shape, device=device) > 0.5)
        graph.replay()
        assert all(torch.equal(w, m * (seed + 1.0)) for w, m in zip(weights, masks, strict=True))


def test_tensors_of_several_devices_and_sizes_are_masked_together(device):
    weights = [
        torch.ones(70, 130, device=where, dtype=dtype) for where in ("cpu", device) for dtype in DTYPES
    ]
    masks = [torch.rand(70, 130, device=weight.device) > 0.5 for weight in weights]
    apply_masks_(weights, masks)
    assert all(torch.equal(w, m.to(w.dtype)) for w, m in zip(weights, masks, strict=True))


def test_a_backward_through_a_weight_that_was_masked_meanwhile_is_an_error(device):
    layer, after = nn.Linear(3, 3, device=device), nn.Linear(3, 3, device=device)
    out = after(layer(torch.randn(2, 3, device=device))).sum()
    apply_masks_([after.weight], [torch.zeros(3, 3, dtype=torch.bool, device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ties", [True, False])
def test_the_same_weights_are_selected_as_on_a_cpu(device, dtype, ties):
    draw = torch.Generator().manual_seed(1)
    scores = {str(i): torch.randn(shape, generator=draw).to(dtype) for i, shape in enumerate(SHAPES)}
    scores = {name: (score * 4).round() if ties else score for name, score in scores.items()}
    total = sum(score.numel() for score in scores.values())
    for num_keep in (0, 1, total // 10, total // 2, total - 1, total):
        wanted = keep_top(scores, num_keep)
        found = keep_top({name: score.to(device) for name, score in scores.items()}, num_keep)
        assert all(torch.equal(found[name].cpu(), wanted[name]) for name in scores)
    rows = scores["5"]
    assert torch.equal(keep_top_rows(rows.to(device), 77).cpu(), keep_top_rows(rows, 77))


@pytest.mark.parametrize("scope", [LAMP(), ERK(), PerRow(), Local()], ids=str)
def test_scopes_rank_alike_each_time(device, scope):
    """Sums of floats differ from one time to the next on a GPU, and what is ranked must not."""
    draw = torch.Generator().manual_seed(2)
    scores = {str(i): torch.rand(300, 4000, generator=draw) for i in range(3)}
    wanted = scope(scores, 0.9)
    there = {name: score.to(device) for name, score in scores.items()}
    for _ in range(3):
        found = scope(there, 0.9)
        assert all(torch.equal(found[name].cpu(), wanted[name]) for name in scores)
