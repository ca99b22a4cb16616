"""The judge of the coverage benchmark is itself judged: on models that are made small by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.example import Example, make_distinct_, make_sensitive_, tensors_in
from benchmarks.zoo.masked import difference, outputs64, reference
from benchmarks.zoo.slices import mistaken, recover, tensors_of, wrong_slices


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised by a batch norm in training, as timm's are."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, len(self.weight), -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-3).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class Normed(nn.Module):
    """Statistics over channels in all spellings; `width` channels in the middle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 1), nn.GroupNorm(1, width)
        self.second, self.layer, self.root = nn.Linear(width, width), nn.LayerNorm(width), nn.RMSNorm(width)
        self.third = Standardised(width, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x))).movedim(1, -1)
        x = self.root(self.layer(self.second(x)))
        x = x * x.mean(-1, keepdim=True) + x / x.std(-1, keepdim=True) - x.var(-1, keepdim=True) * x
        x = x * (x.mean((1, 2)).softmax(-1) + 0.1)[:, None, None]
        lengths = x.norm(dim=(1, 2), keepdim=True)
        x = x * lengths / lengths.mean(-1, keepdim=True)
        return self.third(x.movedim(-1, 1))


KEPT = (0, 2, 3, 7)


def cut() -> tuple[Example, Example]:
    """Return a network of 8 channels and one that consists of 4 of them."""
    torch.manual_seed(0)
    dense = make_sensitive_(Example(Normed(8), (torch.randn(2, 3, 6, 6),)), 0)
    small = Normed(4).eval()
    for name, tensor in dense.model.named_parameters():
        for dim in range(tensor.dim()):
            if tensor.shape[dim] == 8:
                tensor = tensor.index_select(dim, torch.tensor(KEPT))
        small.get_parameter(name).data = tensor.detach().clone()
    return dense, Example(small, dense.args)


def test_indices_are_read_off_the_values():
    dense, small = cut()
    kept = recover(tensors_of(dense.model), small.model)
    assert kept["second.weight"] == {0: KEPT, 1: KEPT}
    assert kept["third.weight"] == {1: KEPT} and "third.bias" not in kept
    small.model.first.weight.data[1, 0] += 0.1
    with pytest.raises(ValueError, match="`first.weight` is no slice"):
        recover(tensors_of(dense.model), small.model)


def test_reference_is_what_the_small_network_computes():
    dense, small = cut()
    kept = recover(tensors_of(dense.model), small.model)
    before = copy.deepcopy(dense.model.state_dict())
    expected = reference(dense, kept)
    assert difference(outputs64(small), expected) < 1e-13
    assert difference(outputs64(dense), expected) > 1e-2
    assert all(torch.equal(before[name], value) for name, value in dense.model.state_dict().items())


def test_one_wrong_index_in_one_tensor_shows():
    dense, small = cut()
    whole = tensors_of(dense.model)
    kept = recover(whole, small.model)
    expected = reference(dense, kept)
    places = wrong_slices(whole, small.model, kept)
    assert len(places) == 3
    for name, dim in places:
        wrong = mistaken(whole[name], small.model, kept, (name, dim), 1)
        others = {n for n, t in tensors_of(small.model).items() if not torch.equal(t, tensors_of(wrong)[n])}
        assert others == {name}
        assert difference(outputs64(Example(wrong, small.args)), expected) > 1e-4


def test_conditioned_activations_have_deviation_one():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)]
    example = make_sensitive_(Example(nn.Sequential(*layers), (torch.randn(4, 3, 6, 6),)), 1)
    (output,) = example.outputs()
    assert output.std().item() == pytest.approx(1, abs=1e-5)
    assert not any((p == 0).any() or (p == 1).any() for p in example.model.parameters())


def test_tensors_in_finds_floats_only():
    a, b = torch.zeros(1), torch.ones(2)
    assert [t.shape for t in tensors_in({"a": a, "b": [b, (torch.ones(3).long(), None)]})] == [(1,), (2,)]


def test_values_are_told_apart_and_hardly_changed():
    """Or slices that a tool has kept could not be read off its tensors: this made right models look wrong."""
    generator = torch.Generator().manual_seed(0)
    scales = 1 + 0.1 * torch.randn(20_000, generator=generator)
    before = scales.clone()
    assert len(scales.unique()) < len(scales)
    make_distinct_(scales, generator)
    assert len(scales.unique()) == len(scales)
    assert (scales - before).abs().max() < 1e-4 and (scales != before).sum() < 200
