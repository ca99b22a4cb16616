"""Small networks, as nn.Modules without any training: MLP, ConvNet, LeNet-5, ResNet-20 and a GPT.

The output layer of each is `head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.core.checks import check_count


class MLP(nn.Module):
    """Linear layers with ReLU between; `MLP()` is LeNet-300-100 (LeCun et al. 1998).

    Args:
        sizes: inputs, hidden layers, outputs; at least two numbers.

    Shapes:
        (B, ...) with `sizes[0]` values each -> (B, `sizes[-1]`).

    Example:
        >>> sum(p.numel() for p in MLP().parameters())
        266610
    """

    def __init__(self, sizes: Sequence[int] = (784, 300, 100, 10)) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"`sizes` is at least inputs and outputs, but got {list(sizes)}.")
        layers: list[nn.Module] = [nn.Flatten()]
        for num_inputs, num_outputs in pairwise(sizes[:-1]):
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-2], sizes[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions with batch norm, and one linear layer: 15,418 parameters at width 16, for 8 x 8 digits.

    Args:
        width: channels of the first convolution, the others have twice as many; at least 1.
        in_channels: of the images.
        num_classes: outputs.

    Shapes:
        (B, `in_channels`, H, W), H and W at least 4 -> (B, `num_classes`).
    """

    def __init__(self, width: int = 16, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        check_count("width", width, minimum=1)
        self.features = nn.Sequential(
            *_conv_norm(in_channels, width, stride=1),
            nn.ReLU(),
            *_conv_norm(width, 2 * width, stride=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            *_conv_norm(2 * width, 2 * width, stride=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """LeNet-5 for 28 x 28 images, with 20 and 50 channels and 500 hidden units: 431,080 parameters.

    This is the "LeNet-5-Caffe" that the pruning literature means (Han et al. 2015, sparse momentum, DNS), not LeCun's
    60,000-parameter network of 1998: results can be compared.

    Shapes:
        (B, 1, 28, 28) -> (B, 10).

    Example:
        >>> sum(p.numel() for p in LeNet5().parameters())
        431080
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()
        )
        self.hidden = nn.Sequential(nn.Linear(800, 500), nn.ReLU())
        self.head = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.features(x)))  # type: ignore[no-any-return]


class ResNet20(nn.Module):
    """The 20-layer ResNet for small images (He et al. 2015, arXiv:1512.03385, section 4.2): 16-32-64 channels.

    With `num_blocks` n it has 6 n + 2 layers: 1 is ResNet-8, 9 is ResNet-56.

    Shortcuts are the paper's option A, as its CIFAR results are: every second pixel, and zeros for the new channels.
    They have no parameters, so nothing but 3 x 3 convolutions and the last layer is there to be pruned.

    Args:
        in_channels: 3 for colour images.
        num_classes: outputs.
        num_blocks: residual blocks of each width, at least 1.

    Shapes:
        (B, `in_channels`, H, W) -> (B, `num_classes`).

    Example:
        >>> sum(p.numel() for p in ResNet20().parameters())
        269722
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, num_blocks: int = 3) -> None:
        super().__init__()
        check_count("num_blocks", num_blocks, minimum=1)
        self.stem = nn.Sequential(*_conv_norm(in_channels, 16, stride=1))
        widths = [width for width in (16, 32, 64) for _ in range(num_blocks)]
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in pairwise([16, *widths])))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.stem(x)))
        return self.head(features.mean((2, 3)))  # type: ignore[no-any-return]


class _Residual(nn.Module):
    """Two convolutions and a shortcut; where the width grows, the image shrinks to a half."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.stride = 1 if num_inputs == num_outputs else 2
        self.num_new = num_outputs - num_inputs
        self.first = nn.Sequential(*_conv_norm(num_inputs, num_outputs, self.stride))
        self.second = nn.Sequential(*_conv_norm(num_outputs, num_outputs, stride=1))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.stride == 1 else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.num_new))
        return F.relu(self.second(F.relu(self.first(x))) + shortcut)


def _conv_norm(num_inputs: int, num_outputs: int, stride: int) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(num_inputs, num_outputs, 3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(num_outputs)


class GPT(nn.Module):
    """A small causal transformer, pre-norm, with learned positions (Radford et al. 2019).

    Args:
        vocab_size: number of tokens.
        block_size: the longest sequence, at least 1.
        num_layers: at least 1.
        num_heads: a divisor of `width`.
        width: of the residual stream.
        tied: whether the output layer is the embedding; then it is pruned only if the embedding is.

    Shapes:
        tokens (B, T) with T at most `block_size` -> logits (B, T, `vocab_size`).

    Example:
        >>> logits = GPT(vocab_size=10, block_size=8, num_layers=1, num_heads=2, width=16)(torch.zeros(2, 5).long())
        >>> logits.shape
        torch.Size([2, 5, 10])
    """

    def __init__(
        self,
        vocab_size: int = 65,
        block_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        width: int = 128,
        tied: bool = False,
    ) -> None:
        super().__init__()
        check_count("num_layers", num_layers, minimum=1)
        if width % check_count("num_heads", num_heads, minimum=1):
            raise ValueError(f"`num_heads` is a divisor of `width`, {width}, but got {num_heads}.")
        self.block_size = check_count("block_size", block_size, minimum=1)
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(block_size, width)
        self.blocks = nn.Sequential(*(_Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self._initialize(num_layers)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        if (length := tokens.shape[1]) > self.block_size:
            raise ValueError(
                f"`tokens` is (B, T) with T at most {self.block_size}, but got {tuple(tokens.shape)}."
            )
        positions = torch.arange(length, device=tokens.device)
        x = self.embedding(tokens) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]

    def _initialize(self, num_layers: int) -> None:
        """Normal with deviation 0.02; what is added to the residual stream less, by the root of the additions."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                is_added = name.endswith(("attention.out", "shrink"))
                nn.init.normal_(module.weight, std=0.02 / (2 * num_layers) ** 0.5 if is_added else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, num_heads)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        added: Tensor = self.shrink(F.gelu(self.grow(self.norm_mlp(x))))
        return x + added


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        heads = self.qkv(x).view(
            size, length, 3, self.num_heads, -1
        )  # whole heads can go: no width is written here
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
