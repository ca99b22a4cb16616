"""Models as people write them: U-Nets, autoencoders, recurrent taggers, networks with several outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.example import Example


def block(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Ronneberger, Fischer and Brox, 2015; the way up by transposed convolutions or by interpolation."""

    def __init__(self, width: int = 16, depth: int = 3, transposed: bool = True) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList([block(3 if i == 0 else widths[i - 1], w) for i, w in enumerate(widths)])
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(w, w // 2, 2, stride=2)
                if transposed
                else nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(w, w // 2, 1))
                for w in widths[:0:-1]
            ]
        )
        self.joined = nn.ModuleList([block(w, w // 2) for w in widths[:0:-1]])
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, down in enumerate(self.down):
            x = down(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, joined, skip in zip(self.up, self.joined, skips[-2::-1], strict=True):
            x = joined(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


class AttentionGate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.skip, self.score = (nn.Conv2d(width, n, 1) for n in (width // 2, width // 2, 1))
        self.score = nn.Conv2d(width // 2, 1, 1)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        return skip * self.score(F.relu(self.gate(gate) + self.skip(skip))).sigmoid()


class AttentionUNet(nn.Module):
    """Oktay et al., 2018, with group norms."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = self.stage(3, width), self.stage(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.attention = AttentionGate(width)
        self.last, self.head = self.stage(2 * width, width), nn.Conv2d(width, 2, 1)

    @staticmethod
    def stage(num_in: int, num_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(num_in, num_out, 3, padding=1), nn.GroupNorm(4, num_out), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        up = self.up(self.second(F.avg_pool2d(skip, 2)))
        return self.head(self.last(torch.cat((self.attention(up, skip), up), 1)))


class Autoencoder(nn.Module):
    """Convolutions down to a vector and back, with a mean and a spread, and two outputs."""

    def __init__(self, width: int = 16, latent: int = 12) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1),
            nn.ELU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ELU(),
            nn.Flatten(),
        )
        self.moments = nn.Linear(2 * width * 49, 2 * latent)
        self.widen = nn.Linear(latent, 2 * width * 49)
        self.decode = nn.Sequential(
            nn.Unflatten(1, (2 * width, 7, 7)),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.ELU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.moments(self.encode(x)).chunk(2, dim=1)
        z = mean + 0.1 * log_variance.mul(0.5).exp()
        return {"picture": self.decode(self.widen(z)), "divergence": (mean**2 + log_variance.exp()).sum()}


class Tagger(nn.Module):
    """Embedding, a recurrent layer, a hidden layer, a tag for each token."""

    def __init__(self, recurrent: type[nn.RNNBase], bidirectional: bool) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, 24), nn.LayerNorm(24)
        self.recurrent = recurrent(24, 32, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.hidden = nn.Linear(64 if bidirectional else 32, 40)
        self.tags = nn.Linear(40, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.norm(self.embedding(tokens)))
        return self.tags(F.gelu(self.hidden(states)))


class MultiTask(nn.Module):
    """A shared trunk, a head for classes and one for boxes, their losses outside."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            block(3, 16), nn.MaxPool2d(2), block(16, 32), nn.MaxPool2d(2), block(32, 32)
        )
        self.shared = nn.Linear(32, 48)
        self.classes, self.boxes = (
            nn.Linear(48, 6),
            nn.Sequential(nn.Linear(48, 24), nn.Mish(), nn.Linear(24, 4)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = F.hardswish(self.shared(self.trunk(x).mean((2, 3))))
        return self.classes(shared), self.boxes(shared)


class PlainTransformer(nn.Module):
    """torch's own encoder and decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        self.place = nn.Parameter(torch.randn(1, 64, 32))
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, 60)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        source, target = (self.embedding(t) + self.place[:, : t.shape[1]] for t in (source, target))
        return self.head(self.transformer(source, target))


def _picture(model: nn.Module, channels: int = 3, size: int = 48) -> Example:
    return Example(model, (torch.randn(2, channels, size, size),))


def _tokens(model: nn.Module, num: int = 1) -> Example:
    return Example(model, tuple(torch.randint(50, (2, 9 + i)) for i in range(num)))


MAKE = {
    "unet_transposed": lambda: _picture(UNet()),
    "unet_bilinear": lambda: _picture(UNet(transposed=False)),
    "unet_attention": lambda: _picture(AttentionUNet()),
    "autoencoder": lambda: _picture(Autoencoder(), 1, 28),
    "multi_task": lambda: _picture(MultiTask()),
    "tagger_lstm": lambda: _tokens(Tagger(nn.LSTM, bidirectional=True)),
    "tagger_gru": lambda: _tokens(Tagger(nn.GRU, bidirectional=False)),
    "tagger_rnn": lambda: _tokens(Tagger(nn.RNN, bidirectional=False)),
    "transformer": lambda: _tokens(PlainTransformer(), 2),
}


def handwritten(name: str) -> Example:
    return MAKE[name]()
