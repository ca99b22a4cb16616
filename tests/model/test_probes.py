"""A proof that would pass whatever the small model does is made to tell, and says so where it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import shrink
from lightning_prune.graph import Couplings, Plan, trace
from lightning_prune.model.equivalence import TOLERANCE, VacuousProofWarning, relative_error, settle
from lightning_prune.model.probes import says_something, with_noise


def zero_last(model: nn.Sequential) -> nn.Sequential:
    """Let the last layer begin as zero, as those of some diffusion models do."""
    nn.init.zeros_(model[-1].weight)
    return model


BLIND = {
    "zeros without biases": lambda: (
        nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)),
        torch.zeros(2, 4),
    ),
    "zeros and a bias at the end": lambda: (
        nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)),
        torch.zeros(2, 4),
    ),
    "ones that a norm centres": lambda: (
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)),
        torch.ones(2, 4),
    ),
    "a last layer of zeros": lambda: (
        zero_last(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))),
        torch.randn(2, 4),
    ),
}


def half(couplings: Couplings) -> dict[str, Tensor]:
    return {name: torch.arange(group.size) % 2 == 0 for name, group in couplings.groups.items()}


@pytest.mark.parametrize("kind", list(BLIND))
def test_wrong_slices_show_on_an_example_that_tells_nothing(kind: str) -> None:
    torch.manual_seed(0)
    model, example = BLIND[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    couplings = trace(model, (example,))
    choice, plan = settle(couplings, lambda: half(couplings))
    assert list(plan.groups.values()) == [(8, 4)] and plan.error is not None and plan.error <= TOLERANCE
    last = f"{len(model) - 1}.weight"
    spoilt: Plan = replace(plan, slices={**plan.slices, last: {1: (1, 3, 5, 7)}})
    own = [((example,), {})]
    assert relative_error(couplings, choice, spoilt, own) <= TOLERANCE  # the example alone is blind
    assert relative_error(couplings, choice, spoilt) > 1e-3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_proves_nothing_whatever_the_input_is_told() -> None:
    class Mute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return 0 * self.b(self.a(x).relu())  # type: ignore[no-any-return]

    with pytest.warns(VacuousProofWarning, match="that proves nothing. Give an example whose outputs show"):
        shrink(Mute(), torch.randn(2, 4), 0.5)


def test_noise_is_the_same_each_time_and_spares_what_varies() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    couplings = trace(model, (torch.zeros(2, 4),), {})
    first, second = with_noise(couplings), with_noise(couplings)
    assert set(first.tensors) == {"1.weight", "1.bias"}
    assert torch.equal(first.args[0], second.args[0]) and first.args[0].std() > 0.5
    assert not says_something([torch.zeros(3), torch.ones(3, dtype=torch.long)])
