"""Runs on fake tensors: what torch would say of them, said sooner."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_prune.graph import trace
from lightning_prune.graph.fakes import AllFake


def said_of(tensors: Sequence[Tensor]) -> list[Any]:
    return [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (5, 3), (2, 3, 7), (2, 3, 2, 2, 2), (1, 3, 2, 1)])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_a_batch_norm_returns_what_torch_says(
    shape, is_training, dtype, has_weight, is_channels_last
) -> None:
    norm = nn.BatchNorm2d(3, affine=has_weight, dtype=dtype)
    x = torch.zeros(shape, dtype=dtype)
    if is_channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    args = (norm.weight, norm.bias, norm.running_mean, norm.running_var, is_training, 0.1, 1e-5)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        expected = torch.native_batch_norm(mode.from_tensor(x), *args)
        with AllFake(mode):
            found = torch.native_batch_norm(mode.from_tensor(x), *args)
    assert said_of(found) == said_of(expected) and all(isinstance(t, FakeTensor) for t in found)


def test_a_batch_norm_of_another_width_fails_as_it_does_in_torch() -> None:
    norm = nn.BatchNorm2d(3).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, AllFake(mode), pytest.raises(RuntimeError):
        norm(torch.zeros(2, 4, 5, 5))


def test_what_is_done_to_a_parameter_in_place_hands_it_back_untouched() -> None:
    weight = nn.Parameter(torch.ones(3))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode, AllFake(mode):
        assert weight.add_(1) is weight and isinstance(weight + 1, FakeTensor)
        assert torch.cat([weight, weight]).shape == (6,) and nn.functional.linear(
            weight, weight[None]
        ).shape == (1,)
    assert weight.tolist() == [1, 1, 1]


def test_no_tensor_of_a_run_is_taken_for_a_parameter() -> None:
    """A fake one that is gone leaves its place in memory, and so its id, to others."""
    weights = [torch.zeros(3) for _ in range(20)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, AllFake(mode):
        for weight in weights:
            for _ in range(5):
                assert not any((weight + 1) is other for other in weights)


class ReadsNumbers(nn.Module):
    """Its code computes with tensors of numbers, whose values it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        half = int(torch.tensor(8) / 2)
        return self.second(self.first(x) * torch.tensor(float(half)).item())


def test_numbers_that_the_code_reads_keep_their_values() -> None:
    couplings = trace(ReadsNumbers(), (torch.zeros(2, 4),))
    assert couplings.record.is_fake and set(couplings.groups) == {"first.weight"}
