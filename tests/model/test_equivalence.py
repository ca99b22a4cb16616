"""What cannot be proved equal is frozen, with the reason; what can, is measured."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.graph import Couplings, Plan, Unsolvable, trace
from lightning_prune.model.equivalence import TOLERANCE, relative_error, settle


def half(couplings: Couplings) -> dict[str, Tensor]:
    return {name: torch.arange(g.size) % 2 == 0 for name, g in couplings.groups.items() if g.role != "head"}


class LinearAttention(nn.Module):
    """Features elu(x) + 1 are 1 where queries and keys are 0: a masked width still counts, a removed one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 4, bias=False) for _ in range(3))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (nn.functional.elu(layer(x)) + 1 for layer in (self.q, self.k))
        return self.out(q @ (k.transpose(-2, -1) @ self.v(x)))  # type: ignore[no-any-return]


def test_what_would_differ_is_frozen_and_the_rest_is_pruned() -> None:
    torch.manual_seed(0)
    couplings = trace(LinearAttention(), (torch.randn(2, 5, 6),))
    frozen: dict[str, str] = {}
    _, plan = settle(
        couplings, lambda: half(couplings), freeze=lambda names, why: frozen.update(dict.fromkeys(names, why))
    )
    assert list(frozen) == ["q.weight"] and "would differ from the masked one by" in frozen["q.weight"]
    assert plan.groups == {"v.weight": (4, 2)}
    assert plan.error is not None and plan.error <= TOLERANCE
    assert couplings.frozen["k.weight[0]"] == frozen["q.weight"]


def test_half_precision_and_internal_casts_are_compared_in_double() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = (h.float() * torch.rsqrt(h.float().square().sum(-1, keepdim=True) + 1e-6)).to(h.dtype)
            return self.b(h)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Casting().bfloat16()
    couplings = trace(model, (torch.randn(2, 6, dtype=torch.bfloat16),))
    _, plan = settle(couplings, lambda: half(couplings))
    assert plan.groups == {"a.weight": (8, 4)} and plan.error is not None and plan.error < 1e-14


def test_the_model_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2)).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    couplings = trace(model, (torch.randn(2, 3, 8, 8),))
    settle(couplings, lambda: half(couplings))
    assert [id(parameter) for parameter in model.parameters()] == identities and model[1].training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("spoil", ["slice", "scale", "shape"])
def test_a_wrong_plan_is_far_off(spoil: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    couplings = trace(model, (torch.randn(5, 4),))
    choice, plan = settle(couplings, lambda: half(couplings))
    slices = {name: dict(dims) for name, dims in plan.slices.items()}
    if spoil == "slice":
        slices["2.weight"][1] = (1, 3, 5, 7)
    elif spoil == "scale":
        from lightning_prune.graph import Scale

        plan = replace(plan, scales=(Scale("0.weight", 0, tuple(range(8)), 1.001),))
    else:
        slices["2.weight"][0] = (0, 1)
        slices["2.bias"] = {0: (0, 1)}
    spoilt: Plan = replace(plan, slices=slices)
    assert relative_error(couplings, choice, spoilt) > 1e-5


def test_several_calls_are_compared_and_the_worst_counts() -> None:
    torch.manual_seed(0)
    couplings = trace(LinearAttention(), (torch.randn(2, 5, 6),))
    choice = {"q.weight": torch.tensor([True, True, True, False])}
    plan = couplings.plan(choice)
    calls = [((torch.randn(2, n, 6),), {}) for n in (1, 4)]
    errors = [relative_error(couplings, choice, plan, [call]) for call in calls]
    assert relative_error(couplings, choice, plan, calls) == max(errors) > 0


def test_a_model_that_knows_no_float64_is_compared_in_its_own_precision() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("no kernel for float64")
            return self.b(self.a(x).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    couplings = trace(Single(), (torch.randn(2, 6),))
    _, plan = settle(couplings, lambda: half(couplings))
    assert plan.groups == {"a.weight": (8, 4)} and plan.error is not None and plan.error < 1e-5


def test_a_model_that_draws_in_eval_mode_is_told() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.count = nn.Linear(6, 8), nn.Linear(8, 2), iter(range(99))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + next(self.count)  # type: ignore[no-any-return]

    couplings = trace(Noisy(), (torch.randn(2, 6),))
    with pytest.raises(ValueError, match="with nothing removed they differ"):
        settle(couplings, lambda: half(couplings))


def test_standardised_weights_are_standardised_over_what_survives() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0)
            return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)

    torch.manual_seed(0)
    model = nn.Sequential(
        Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    couplings = trace(model, (torch.randn(2, 3, 5, 5),))
    _, plan = settle(couplings, lambda: half(couplings))
    assert plan.groups == {"0.weight": (8, 4), "2.weight": (6, 3)}


def test_a_model_that_has_changed_since_it_was_traced_is_refused():
    """There is no group to blame where nothing is removed."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    couplings = trace(net, (torch.randn(2, 4),))
    net[2] = nn.Linear(7, 3)
    with pytest.raises(
        ValueError, match="`call` runs as it did when it was traced, but with nothing removed"
    ):
        settle(couplings, dict)


def test_a_choice_that_is_found_not_to_follow_while_it_is_made_is_made_anew():
    """A latency is measured on models that are built while it is chosen."""
    couplings = trace(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)), (torch.randn(2, 6),))

    def choose() -> dict[str, Tensor]:
        if "0.weight" in couplings.groups:
            raise Unsolvable("a size in the code", ["0.weight"])
        return half(couplings)

    _, plan = settle(couplings, choose)
    assert plan.groups == {"1.weight": (8, 4)} and couplings.frozen["0.weight[0]"] == "a size in the code"
