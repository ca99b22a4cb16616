"""Masks and selection on a GPU are what they are on a CPU, bit for bit, and nothing waits for them."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_prune.core.selection import keep_top, keep_top_rows
from lightning_prune.model import fused
from lightning_prune.model.apply import apply_masks_
from tests.model.test_apply import DTYPES, SPECIAL

SHAPES = [(3,), (70, 130), (), (0, 4), (4096,), (300, 4097), (6, 5, 3, 3)]


@contextmanager
def no_waiting():
    """Let what waits for the device be an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
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
