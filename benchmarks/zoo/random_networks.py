"""Random small networks: graphs of pieces, whose inputs are any tensors that are there by then.

A network is a function of its seed alone. Pictures, sequences, vectors and tokens flow through pieces of all families,
meet in sums and concatenations, and some weights are tied; one tensor is returned, or several.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.example import Example, make_sensitive_, tensors_in
from benchmarks.zoo.pieces import Code, Make, Shape, coin, pairs, pictures, sequences, vectors

FAMILIES = {3: pictures, 2: sequences, 1: vectors}
MAX_ENTRIES = 600  # of a tensor of one example: networks are to be small
VOCABULARY = 11


class Network(nn.Module):
    """Steps, each of which reads some of the tensors before it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.wiring: list[tuple[int, ...]] = []
        self.returned: dict[str, int] = {}

    def forward(self, *inputs: Tensor) -> Tensor | dict[str, Tensor] | tuple[Tensor, ...]:
        tensors = list(inputs)
        for step, sources in zip(self.steps, self.wiring, strict=True):
            tensors.append(step(*(tensors[s] for s in sources)))
        found = {name: tensors[place] for name, place in self.returned.items()}
        if "0" in found:
            return found["0"] if len(found) == 1 else tuple(found.values())
        return found


class Builder:
    """A network that grows piece by piece, together with an example of its inputs.

    Args:
        seed: says everything.
    """

    def __init__(self, seed: int) -> None:
        self.draw = Random(seed)
        torch.manual_seed(seed)
        self.network = Network()
        self.batch = self.draw.choice([2, 3])
        self.inputs: list[Tensor] = [self._input() for _ in range(self.draw.choice([1, 1, 2]))]
        self.tensors = list(self.inputs)
        for place, tensor in enumerate(self.inputs):
            if not tensor.is_floating_point():
                self._embed(place)

    def _input(self) -> Tensor:
        kind, size = (
            self.draw.choice(["picture", "picture", "sequence", "vector", "tokens"]),
            self.draw.randrange,
        )
        if kind == "tokens":
            return torch.randint(VOCABULARY, (self.batch, size(3, 7)))
        shape = {
            "picture": (self.draw.choice([1, 2, 3, 4]), *self.draw.choice([(4, 4), (8, 8), (6, 5)])),
            "sequence": (size(3, 7), size(2, 9)),
            "vector": (size(2, 13),),
        }[kind]
        return torch.randn(self.batch, *shape)

    def _embed(self, place: int) -> None:
        width = self.draw.choice([4, 6, 8])
        if coin(self.draw, 0.8):
            self.add(nn.Embedding(VOCABULARY, width, padding_idx=self.draw.choice([None, 0])), place)
        else:
            self.add(nn.EmbeddingBag(VOCABULARY, width, mode=self.draw.choice(["sum", "mean"])), place)

    def add(self, step: nn.Module, *sources: int) -> bool:
        """Let a step read some tensors, if it can and what it makes is no monster."""
        try:
            with torch.no_grad():
                made = step.eval()(*(self.tensors[s] for s in sources))
        except (
            RuntimeError,
            ValueError,
            IndexError,
            AssertionError,
        ):  # a piece that does not fit these sizes
            return False
        if not isinstance(made, Tensor) or not 2 <= made.dim() <= 4 or made.shape[0] != self.batch:
            return False
        if not 2 <= made[0].numel() <= MAX_ENTRIES or not bool(made.isfinite().all()) or 0 in made.shape:
            return False
        self.network.steps.append(step)
        self.network.wiring.append(sources)
        self.tensors.append(made)
        return True

    @property
    def floats(self) -> list[int]:
        """The places of tensors that pieces can read."""
        return [place for place, tensor in enumerate(self.tensors) if tensor.is_floating_point()]

    def shape(self, place: int) -> Shape:
        return tuple(self.tensors[place].shape[1:])

    def grow(self) -> None:
        """Add a piece behind one tensor, mostly a late one, or behind two."""
        places = self.floats
        place = places[-1] if coin(self.draw, 0.6) else self.draw.choice(places)
        if coin(self.draw, 0.25) and (partner := self._partner(place)) is not None:
            self.add(self.draw.choice(pairs.PAIRS)(self.draw, self.shape(place)), place, partner)
            return
        if coin(self.draw, 0.06) and self._again(place):
            return
        family = FAMILIES[len(self.shape(place))]
        makes: Sequence[Make] = family.EXITS if coin(self.draw, 0.15) else family.PIECES
        if (step := self.draw.choice(makes)(self.draw, self.shape(place))) is not None:
            self.add(step, place)

    def _partner(self, place: int) -> int | None:
        """Return another tensor of the same shape, one that is projected to it, if need be."""
        shape = self.shape(place)
        alike = [p for p in self.floats if p != place and self.shape(p) == shape]
        if alike and coin(self.draw, 0.7):
            return self.draw.choice(alike)
        near = [p for p in self.floats if p != place and len(self.shape(p)) == len(shape)]
        for other in self.draw.sample(near, len(near)):
            if self._project(other, shape):
                return len(self.tensors) - 1
        return None

    def _project(self, place: int, shape: Shape) -> bool:
        found = self.shape(place)
        if len(shape) == 3 and found[1:] == shape[1:]:
            return self.add(nn.Conv2d(found[0], shape[0], 1), place)
        if len(shape) < 3 and found[:-1] == shape[:-1]:
            return self.add(nn.Linear(found[-1], shape[-1]), place)
        return False

    def _again(self, place: int) -> bool:
        """Use a piece once more: its weights are shared by two places."""
        again = [s for s, w in zip(self.network.steps, self.network.wiring, strict=True) if len(w) == 1]
        fitting = [s for s in again if any(True for _ in s.parameters())]
        return any(self.add(step, place) for step in self.draw.sample(fitting, min(3, len(fitting))))

    def tie(self) -> None:
        """Let two linear layers of one shape share their weight, or an output be scored against an embedding."""
        layers = [m for m in self.network.modules() if type(m) in (nn.Linear, nn.Conv2d)]
        for first in layers:
            for second in layers:
                if first is not second and first.weight.shape == second.weight.shape:
                    second.weight = first.weight
                    return
        tables = [m for m in self.network.modules() if isinstance(m, nn.Embedding)]
        for place in reversed(self.floats):
            for table in tables:
                if self.shape(place)[-1] == table.embedding_dim and len(self.shape(place)) < 3:
                    self.add(Code(lambda m, x: F.linear(x, m.table.weight), table=table), place)
                    return

    def finish(self) -> Example:
        """Return the last tensor, through a layer mostly, and mostly all others that no piece reads; weights matter."""
        if coin(self.draw, 0.8) or not any(True for _ in self.network.parameters()):
            self._close()
        example = self._returning()
        if not any(
            t.requires_grad for t in tensors_in(self.network(*self.inputs))
        ):  # they pass all weights by
            self._close()
            example = self._returning()
        return example

    def _close(self) -> None:
        """Add a last layer."""
        last, shape = len(self.tensors) - 1, self.shape(len(self.tensors) - 1)
        self.add(nn.Conv2d(shape[0], 3, 1) if len(shape) == 3 else nn.Linear(shape[-1], 3), last)

    def _returning(self) -> Example:
        """Choose what is returned: the last tensor, and mostly all others that no piece reads."""
        read = {source for sources in self.network.wiring for source in sources}
        made = range(len(self.inputs), len(self.tensors))
        more = [p for p in made if p not in read or coin(self.draw, 0.05)] if coin(self.draw, 0.8) else []
        places = dict.fromkeys([len(self.tensors) - 1, *more])
        prefix = self.draw.choice(["", "tensor_"])
        self.network.returned = {f"{prefix}{i}": place for i, place in enumerate(places)}
        return Example(self.network, tuple(self.inputs))


def random_network(seed: int) -> Example:
    """Return a network of 2 to 14 pieces with a call of it; its weights are such that a wrong slice shows."""
    builder = Builder(seed)
    for _ in range(builder.draw.randrange(2, 15)):
        builder.grow()
    if coin(builder.draw, 0.15):
        builder.tie()
    example = builder.finish()
    if not any(t.requires_grad for t in tensors_in(example.model(*example.args))):
        return random_network(seed + 10**7)  # no weight matters, and no layer fits behind what is returned
    return make_sensitive_(example, seed)
