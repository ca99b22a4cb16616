"""One kernel for the masks of all weights on a GPU; where there is none, Triton's interpreter runs it if installed."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_prune.model.fused import BLOCK, is_on_gpu, table_of
from tests.conftest import ROOT

TRITON = ROOT / ".ci" / "triton"
"""Where `.ci/run` installs Triton, for this test alone: half a gigabyte that nothing else needs on a CPU."""
INTERPRETED = """
import torch
from lightning_prune.model.fused import zero_pruned_

draw = torch.Generator().manual_seed(0)
for dtype, integer in [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)]:
    shapes = [(3,), (70, 130), (), (0, 4), (4096,), (2, 4097)]
    values = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    values[1][0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    masks = [torch.rand(shape, generator=draw) > 0.7 for shape in shapes]
    weights = [value.clone() for value in values]
    versions = [weight._version for weight in weights]
    assert zero_pruned_(weights, masks) == []
    for weight, value, mask, version in zip(weights, values, masks, versions):
        bits = value.view(integer)
        assert torch.equal(weight.view(integer), torch.where(mask, bits, torch.zeros_like(bits)))
        assert weight._version > version
turned = torch.ones(3, 2).T
assert [rest is turned for rest, _ in zero_pruned_([turned], [torch.zeros(2, 3, dtype=torch.bool)])] == [True]
assert bool((turned == 1).all())
print("equal")
"""


def test_the_kernel_zeroes_what_masks_remove_and_nothing_else(subprocess_env):
    if not TRITON.is_dir():
        pytest.importorskip("triton")
    path = os.pathsep.join((subprocess_env["PYTHONPATH"], str(TRITON)))
    environment = {**subprocess_env, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.stdout.split() == ["equal"], ran.stderr


def test_a_table_has_each_weight_once():
    pieces = ((1 << 20, 5, 2 * BLOCK + 1), (1 << 30, 99999, 3), (7, 8, 0), (1 << 40, 1 << 41, BLOCK))
    table = table_of(pieces, 4, -1).tolist()
    seen = [(w + 4 * i, m + i) for w, m, number in table for i in range(number)]
    assert seen == [(w + 4 * i, m + i) for w, m, number in pieces for i in range(number)]
    assert max(number for _, _, number in table) == BLOCK


def test_what_lies_on_no_gpu_or_nowhere_is_masked_otherwise():
    tensors = [torch.ones(4), nn.Parameter(torch.ones(2, 2))]
    with FakeTensorMode():
        tensors.append(torch.ones(3, device="cuda"))
        masks = [torch.ones(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
        assert tensors[-1].is_cuda and not any(map(is_on_gpu, tensors, masks))


def test_a_table_lies_on_the_cpu_first_whatever_the_default_device_is():
    with torch.device("meta"):
        table = table_of(((1 << 21, 3, 5),), 4, -1)
    assert table.tolist() == [[1 << 21, 3, 5]]
