"""Which blocks can be skipped."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.examples.networks import GPT, ResNet20
from lightning_prune.graph import trace


class Residual(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "plain":
            return x + self.a(x)
        if self.kind == "two branches":
            return x + self.a(x) + self.b(x)
        if self.kind == "tuple":
            return x + self.a(x), None
        if self.kind == "rectified":
            return (x + self.a(x)).relu()
        if self.kind == "scaled":
            return 0.5 * x + self.a(x)
        if self.kind == "projected":
            return self.b(x) + self.a(x)
        return self.a(x)


class Stack(nn.Module):
    def __init__(self, kind: str, rectify: bool) -> None:
        super().__init__()
        self.embed, self.block, self.head, self.rectify = (
            nn.Linear(3, 4),
            Residual(kind),
            nn.Linear(4, 2),
            rectify,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).relu() if self.rectify else self.embed(x)
        x = self.block(x)
        return self.head(x[0] if isinstance(x, tuple) else x)


@pytest.mark.parametrize(
    ("kind", "rectify", "can_go"),
    [
        ("plain", False, True),
        ("two branches", False, True),
        ("tuple", False, True),
        ("rectified", True, True),
        ("rectified", False, False),
        ("scaled", False, False),
        ("projected", False, False),
        ("no sum", False, False),
    ],
)
def test_a_block_can_go_if_it_adds_to_its_input(kind: str, rectify: bool, can_go: bool) -> None:
    blocks = trace(Stack(kind, rectify), (torch.randn(2, 3),)).blocks
    assert set(blocks) == ({"block"} if can_go else set())
    assert not can_go or blocks["block"].num_params == 40


def test_blocks_of_a_residual_network_with_constant_width() -> None:
    blocks = trace(ResNet20(), (torch.randn(2, 3, 32, 32),)).blocks
    assert list(blocks) == [f"blocks.{i}" for i in (0, 1, 2, 4, 5, 7, 8)]  # 3 and 6 change the width


def test_blocks_of_a_transformer_are_its_layers() -> None:
    blocks = trace(GPT(vocab_size=11), (torch.randint(0, 11, (2, 8)),)).blocks
    assert list(blocks) == [f"blocks.{i}" for i in range(4)]


def test_a_block_that_runs_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Residual("plain"), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.block(x)))

    assert trace(Twice(), (torch.randn(2, 4),)).blocks == {}


class Layered(nn.Module):
    """A pre-norm layer whose branches are modules; the way from one to the sum varies."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(4)
        self.attention = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "in place":
            x += self.attention(self.norm(x))
        elif self.kind == "scaled":
            x = x + nn.functional.dropout(self.gain * self.attention(self.norm(x)), 0.1, self.training)
        elif self.kind == "by keyword":
            x = x + self.attention(input=self.norm(x))
        elif self.kind == "used twice":
            y = self.attention(self.norm(x))
            x = x + y + y.mean()
        elif self.kind == "not of the stream":
            x = self.norm(x) + self.attention(x)
        elif self.kind == "rectified":
            x = x + self.attention(self.norm(x)).relu()
        else:
            x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize(
    ("kind", "can_go"),
    [
        ("plain", True),
        ("in place", True),
        ("scaled", True),
        ("by keyword", True),
        ("used twice", False),
        ("not of the stream", False),
        ("rectified", False),
    ],
)
def test_a_branch_can_go_if_it_is_added_to_the_stream(kind: str, can_go: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 4), Layered(kind), nn.Linear(4, 2))
    branches = trace(net, (torch.randn(5, 3),)).branches
    assert set(branches) == ({"1.attention", "1.mlp"} if can_go else {"1.mlp"})
    if kind == "by keyword":
        assert branches["1.attention"].replacement == "zero:input"


def written_to(x: Tensor) -> Tensor:
    x[:, :2] = x[:, 2:] * 2
    return x


WAYS = {
    "as it is": lambda x: x,
    "relu_": torch.relu_,
    "in place": lambda x: x.add_(1),
    "written to": written_to,
}


class Siamese(nn.Module):
    """A tower that is called on each of two inputs; the other one may be computed from what the first call gave."""

    def __init__(self, layers: nn.Module, chained_by: str | None) -> None:
        super().__init__()
        self.embed, self.layers, self.chained_by = nn.Linear(3, 4), layers, chained_by

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = self.layers(self.embed(x))
        return x * self.layers(WAYS[self.chained_by](x) if self.chained_by else self.embed(other))


@pytest.mark.parametrize("chained_by", [None, *WAYS])
def test_blocks_can_go_where_a_network_is_called_twice_but_not_on_what_it_gave(
    chained_by: str | None,
) -> None:
    inputs = torch.randn(2, 3), torch.randn(5, 3)[:2]
    layers = nn.Sequential(Residual("plain"), Residual("two branches"))
    found = trace(Siamese(layers, chained_by), inputs).blocks
    assert list(found) == ([] if chained_by else ["layers.0", "layers.1"])
    branches = trace(Siamese(Layered("plain"), chained_by), inputs).branches
    assert list(branches) == ([] if chained_by else ["layers.attention", "layers.mlp"])
