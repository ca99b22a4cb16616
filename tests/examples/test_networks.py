from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.examples.networks import GPT, MLP, ConvNet, LeNet5, ResNet20


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (MLP((64, 32, 10)), (2, 1, 8, 8)),
        (MLP(), (2, 1, 28, 28)),
        (ConvNet(), (2, 1, 8, 8)),
        (ConvNet(in_channels=3), (2, 3, 32, 32)),
        (LeNet5(), (2, 1, 28, 28)),
        (ResNet20(), (2, 3, 32, 32)),
        (ResNet20(in_channels=1), (2, 1, 28, 28)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_images_give_ten_logits(network, shape):
    assert network(torch.rand(shape)).shape == (2, 10)


def test_resnet_has_the_twenty_layers_of_the_paper():
    layers = [m for m in ResNet20().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 20
    # He et al. 2015, table 6: 0.27 M parameters
    assert 0.265e6 < sum(p.numel() for p in ResNet20().parameters()) < 0.275e6


def test_gpt_is_the_one_of_the_benchmarks():
    # 4 layers of width 128 with untied output: 0.82 M parameters
    assert 0.81e6 < sum(p.numel() for p in GPT().parameters()) < 0.83e6


def test_gpt_sees_no_future():
    torch.manual_seed(0)
    gpt = GPT(vocab_size=11, block_size=12, num_layers=2, num_heads=2, width=16).eval()
    tokens = torch.randint(11, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 11
    before, after = gpt(tokens), gpt(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_gpt_knows_positions():
    torch.manual_seed(0)
    gpt = GPT(vocab_size=5, block_size=4, num_layers=1, num_heads=1, width=8).eval()
    out = gpt(torch.zeros(1, 4, dtype=torch.long))
    assert not torch.allclose(out[0, 0], out[0, 1])


def test_gpt_ties_its_output_to_the_embedding():
    tied, untied = GPT(tied=True), GPT()
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP((10,)), r"`sizes` is at least inputs and outputs, but got \[10\]"),
        (lambda: ConvNet(width=0), "`width` is a whole number of at least 1, but got 0"),
        (lambda: GPT(num_heads=3), "`num_heads` is a divisor of `width`, 128, but got 3"),
        (lambda: GPT(block_size=4)(torch.zeros(1, 5).long()), r"T at most 4, but got \(1, 5\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
