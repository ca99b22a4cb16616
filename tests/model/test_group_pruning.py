"""Coupled groups over several updates: cut or masked alike, budgets of the dense model, what cannot follow."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_prune import Budget, Channel, Global, Head, Isomorphic, Local, Movement, shrink
from lightning_prune.core.recipe import Recipe
from lightning_prune.examples.networks import GPT
from lightning_prune.model.budget import NUM_MEASURED
from lightning_prune.model.calls import Call
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.surgery import sliced

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
ANY = Channel(multiple_of=1)


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    with torch.no_grad():
        model[2].weight.mul_(3)
    return model


def pruner_of(model, x=X, sparsity=None, **nouns):
    return GroupPruner(model, Recipe(sparsity, **{"granularity": ANY, **nouns}), Call(model, (x,), {}))


def num_params(model):
    return sum(p.numel() for p in model.parameters())


class Stubborn(nn.Module):
    """Checks a width in its code, which no tracing can solve for."""

    def __init__(self, *widths):
        super().__init__()
        self.widths = widths or (32,)
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        h = self.a(x).relu()
        if h.shape[-1] not in self.widths:
            raise RuntimeError(f"I want {' or '.join(map(str, self.widths))}")
        return self.c(self.b(h.tanh()).relu())


@pytest.mark.parametrize("scope", [Global(), Local(), Isomorphic()], ids=str)
@pytest.mark.parametrize(
    "granularity", [ANY, Channel(), Channel(multiple_of=1, min_keep=0.5), Channel(reduction="max")]
)
def test_cutting_at_each_update_or_at_the_end_gives_the_same_model(scope, granularity):
    small = []
    for cuts_each in (True, False):
        pruner = pruner_of(model := mlp(), sparsity=0.7, scope=scope, granularity=granularity)
        for fraction in (0.3, 0.6, 0.85, 1.0):
            pruner.update_(fraction)
            if cuts_each:
                pruner.shrink_()
        if not cuts_each:
            pruner.shrink_()
        small.append((model.state_dict(), pruner.sparsity, pruner.num_groups))
    assert small[0][1:] == small[1][1:]
    for name, tensor in small[0][0].items():
        assert torch.equal(tensor, small[1][0][name])


@pytest.mark.parametrize("kind", ["params", "macs", "num_bytes"])
@pytest.mark.parametrize("cuts_each", [True, False])
@pytest.mark.parametrize("granularity", [ANY, Channel(multiple_of=4)])
def test_a_budget_is_that_of_the_dense_model_however_often_it_is_cut(kind, cuts_each, granularity):
    """All layers of the MLP have biases: parameters, bytes and (but for biases) work fall alike."""
    pruner = pruner_of(model := mlp(), budget=Budget(**{kind: 0.4}), granularity=granularity)
    dense = num_params(model)
    draw = torch.Generator().manual_seed(1)
    for fraction in (0.3, 0.6, 0.85, 0.99, 1.0, 1.0):
        pruner.update_(fraction)
        if cuts_each:
            pruner.shrink_()
            assert num_params(model) / dense > 0.4 - 0.03
        with torch.no_grad():  # training moves what is good
            for parameter in model.parameters():
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=draw))
        pruner.apply_()
    pruner.shrink_()
    assert num_params(model) / dense == pytest.approx(0.4, abs=0.02 if kind != "macs" else 0.04)
    assert pruner.contest.cost(pruner.choice) == pytest.approx(0.4, abs=0.02)


def test_a_budget_that_moved_out_of_reach_is_told_and_not_raised():
    """At the end of a run it is too late to refuse: what was solved for before is kept, and the miss is named."""
    pruner = pruner_of(
        model := mlp(), budget=Budget(params=0.5, tolerance=0.03), granularity=Channel(multiple_of=4)
    )
    pruner.update_(0.5)
    cost = pruner.contest.cost(pruner.choice)
    assert (
        pruner.missed
        == f"Budget(params=0.5, tolerance=0.03) is missed: params are {cost:.3f} of the dense model's."
    )
    pruner.contest.spent *= 0.6  # as if more had been cut than the budget leaves
    pruner.update_(1.0)
    assert pruner.missed is not None and pruner.contest.cost(pruner.choice) < 0.47
    assert num_params(model) > 0


def test_what_cannot_follow_stays_whole_and_is_never_masked():
    torch.manual_seed(0)
    model = Stubborn()
    before = copy.deepcopy(model.state_dict())
    pruner = pruner_of(model, sparsity=0.5, scope=Local())
    pruner.update_(0.5)
    assert list(pruner.frozen) == ["a.weight"] and "I want 32" in pruner.frozen["a.weight"]
    assert torch.equal(model.a.weight, before["a.weight"]) and set(pruner.choice) == {"b.weight"}
    pruner.update_(1.0)
    plan = pruner.shrink_()
    assert plan.groups["b.weight"] == (32, 16) and model.a.out_features == 32 and model.b.out_features == 16
    assert (pruner.sparsity, pruner.num_groups) == (0.5, 32)
    assert pruner.count_groups("a.weight") is None and pruner.count_groups("b.weight") == (32, 16)


def test_the_others_make_up_for_what_cannot_follow():
    torch.manual_seed(0)
    model = Stubborn()
    dense, weight = num_params(model), model.a.weight.detach().clone()
    shrink(model, X, budget=Budget(params=0.7), granularity=ANY)
    assert num_params(model) / dense == pytest.approx(0.7, abs=0.02)
    assert torch.equal(model.a.weight, weight)
    with pytest.raises(ValueError, match=r"out of reach .* params=0\.\d+"):
        shrink(model, X, budget=Budget(params=0.1), granularity=ANY)


def test_nothing_left_says_why():
    model = nn.Sequential(Stubborn())
    with pytest.raises(ValueError, match=r"finds nothing to prune .*I want 32"):
        shrink(model, X, 0.5, granularity=ANY, exclude=["0.b"])


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize(
    "nouns",
    [{"sparsity": 0.6}, {"budget": Budget(params=0.4)}, {"sparsity": 0.6, "scope": Isomorphic()}],
    ids=["sparsity", "budget", "isomorphic"],
)
def test_a_state_goes_on_where_it_was_saved(nouns, cuts):
    model = mlp()
    pruner = pruner_of(model, **nouns)
    for fraction in (0.4, 0.7):
        pruner.update_(fraction)
        if cuts:
            pruner.shrink_()
    torch.save(pruner.state_dict(), file := io.BytesIO())
    twin = copy.deepcopy(model)
    again = pruner_of(twin, X[:2], **nouns)  # another batch size
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for name, mask in pruner.masks.items():
        assert torch.equal(again.masks[name], mask)
    assert (again.requested, again.sparsity, again.num_groups) == (
        pruner.requested,
        pruner.sparsity,
        pruner.num_groups,
    )
    for each in (pruner, again):
        each.update_(1.0)
        each.shrink_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])


def test_a_state_of_another_model_is_refused_and_nothing_is_changed():
    pruner = pruner_of(mlp(), sparsity=0.5)
    pruner.update_(1.0)
    state = pruner.state_dict()
    other = pruner_of(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), sparsity=0.5)
    with pytest.raises(ValueError, match="`choice` of the checkpoint belongs to the groups"):
        other.load_state_dict(state)
    assert other.choice == {} and other.plans == [] and other.masks == {}


def test_masks_make_the_model_do_what_the_small_one_does():
    """Convolutions, batch norms (their scales, shifts and running statistics), and no norm over channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16, affine=False),
        nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    x = torch.randn(4, 3, 9, 9)
    for _ in range(3):
        model(x + torch.rand(()))
    pruner = pruner_of(model.double(), x.double(), sparsity=0.5)
    pruner.update_(1.0)
    masked = copy.deepcopy(model).eval()
    pruner.shrink_()
    assert model[0].out_channels < 16 and model[4].num_features < 16
    torch.testing.assert_close(model.eval()(x.double()), masked(x.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", [Channel(), Head()])
def test_movement_ranks_groups_of_a_training_run(granularity):
    torch.manual_seed(0)
    model, x = GPT(vocab_size=11), torch.arange(32).view(2, 16) % 11
    pruner = pruner_of(model, x, sparsity=0.5, granularity=granularity, criterion=Movement(), scope=Local())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        for name, parameter in model.named_parameters():
            moved[name] -= parameter.grad * parameter.detach()
        pruner.statistics.note_gradients()
        optimizer.step()
        pruner.statistics.confirm()
    pruner.update_(1.0)
    name = "blocks.0.shrink.weight"
    if isinstance(granularity, Head):
        heads = moved["blocks.0.attention.qkv.weight"].view(3, 4, 32, 128).sum((0, 2, 3))
        heads += moved["blocks.0.attention.out.weight"].view(128, 4, 32).sum((0, 2))
        expected, found = heads, pruner.choice["blocks.0.attention.qkv.weight[head]"]
    else:
        expected = moved["blocks.0.grow.weight"].sum(1) + moved[name].sum(0)
        found = pruner.choice["blocks.0.grow.weight"]
    assert set(found.nonzero().flatten().tolist()) == set(expected.topk(int(found.sum())).indices.tolist())


def test_a_group_cut_to_a_single_index_is_remembered():
    pruner = pruner_of(model := mlp(), sparsity=0.99, scope=Local())
    pruner.update_(1.0)
    pruner.shrink_()
    assert model[0].out_features == model[2].out_features == 1
    assert pruner.sparsity == pytest.approx(110 / 112) and pruner.count_groups("0.weight") == (64, 1)
    pruner.update_(1.0)
    assert pruner.sparsity == pytest.approx(110 / 112)


class Parts(nn.Module):
    """One layer whose outputs are read in two parts, of which the first hardly matters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = 4, 8
        self.a, self.b, self.c = nn.Linear(16, 12), nn.Linear(4, 3), nn.Linear(8, 3)
        with torch.no_grad():
            self.a.weight[:4] *= 0.01
            self.b.weight *= 0.01

    def forward(self, x):
        left, right = self.a(x).split([self.left, self.right], -1)
        return self.b(left.relu()) + self.c(right)


def test_groups_keep_their_names_when_others_become_too_small_to_be_any():
    """The first part is cut to a single index, so that the second one is the only group of its tensor."""
    model = Parts()
    pruner = pruner_of(model, sparsity=0.75, granularity=Channel(multiple_of=1, normalize="none"))
    assert list(pruner.couplings.groups) == ["a.weight", "a.weight[dim 0]"]
    kept = []
    for fraction in (0.5, 0.75, 1.0):
        pruner.update_(fraction)
        pruner.shrink_()
        kept.append((model.left, model.right))
        assert set(pruner.couplings.groups) <= {"a.weight[dim 0]"}
        resumed = pruner_of(model, sparsity=0.75, granularity=pruner.recipe.granularity)
        resumed.load_state_dict(pruner.state_dict())
        assert resumed.couplings.groups.keys() == pruner.couplings.groups.keys()
        assert resumed.outputs == pruner.outputs and resumed.sparsity == pruner.sparsity
    assert kept == [(1, 7), (1, 4), (1, 2)]
    assert pruner.sparsity == pytest.approx(0.75)


def test_a_model_of_which_nothing_more_can_go_is_resumed():
    model = mlp()
    pruner = pruner_of(model, sparsity=0.98, scope=Global(min_keep=1))
    pruner.update_(1.0)
    pruner.shrink_()
    assert [model[0].weight.shape[0], model[2].weight.shape[0]] == [1, 1] and not pruner.couplings.groups
    resumed = pruner_of(model, sparsity=0.98)
    resumed.load_state_dict(pruner.state_dict())
    resumed.update_(1.0)
    assert resumed.sparsity == pruner.sparsity and resumed.count_groups("0.weight") == (64, 1)
    with pytest.raises(ValueError, match="finds nothing to prune"):
        pruner_of(model, sparsity=0.5).update_(1.0)


@pytest.fixture
def clock(monkeypatch):
    """The number of weights stands for the time, so that the test asks for no quiet machine; the rest is real."""
    asked = []

    def ratio(dense, small, precision):
        asked.append([float(num_params(call.module)) for call in (dense, small)])
        return asked[-1][1] / asked[-1][0]

    monkeypatch.setattr("lightning_prune.model.prices.latency_ratio", ratio)
    return asked


@pytest.mark.parametrize("cuts", [True, False])
def test_a_latency_is_measured_once_and_what_it_needs_is_kept(clock, cuts):
    """The numbers are found before anything is cut; which channels those are is seen as the model learns."""
    pruner = pruner_of(model := mlp(), budget=Budget(latency=0.5))
    dense, draw = num_params(model), torch.Generator().manual_seed(1)
    pruner.update_(0.2)
    solved, num_asked = dict(pruner.contest.solved), len(clock)
    assert all(first == dense for first, _ in clock) and 0 < num_asked <= 4 * NUM_MEASURED
    torch.save(pruner.state_dict(), file := io.BytesIO())
    pruner = pruner_of(model, X, budget=Budget(latency=0.5))
    pruner.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for fraction in (0.5, 0.9, 1.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.randn(parameter.shape, generator=draw))
        pruner.update_(fraction)
        assert all(kept >= solved[name] for name, kept in pruner.contest.counts(pruner.choice).items())
        if cuts:
            pruner.shrink_()
    pruner.shrink_()
    assert len(clock) == num_asked
    assert {"0.weight": model[0].out_features, "2.weight": model[2].out_features} == solved
    assert num_params(model) / dense == pytest.approx(0.5, abs=0.02)


def test_what_cannot_follow_is_not_timed(clock):
    torch.manual_seed(0)
    model = Stubborn()
    dense = num_params(model)
    shrink(model, X, budget=Budget(latency=0.7), granularity=ANY)
    assert num_params(model) / dense == pytest.approx(0.7, abs=0.02) and model.a.out_features == 32


@pytest.mark.parametrize("on_the_way", [True, False])
def test_what_cannot_follow_one_of_the_choices_that_are_timed_is_frozen(clock, on_the_way):
    """Half of it can go, but not what the budget asks for: that shows only in the search."""
    torch.manual_seed(0)
    model = Stubborn(32, 16)
    dense, pruner = num_params(model), pruner_of(model, budget=Budget(latency=0.7), scope=Local())
    if on_the_way:
        pruner.update_(0.5)
    pruner.update_(1.0)
    pruner.shrink_()
    assert num_params(model) / dense == pytest.approx(0.7, abs=0.02) and model.a.out_features == 32
    assert "I want" in pruner.frozen["a.weight"]


def test_an_excluded_embedding_keeps_its_width_and_with_it_the_whole_stream():
    torch.manual_seed(0)
    model, x = GPT(vocab_size=11), torch.arange(32).view(2, 16) % 11
    shrink(model, x, 0.5, exclude=["embedding"])
    assert model.embedding.embedding_dim == model.head.in_features == 128
    assert model.blocks[0].grow.out_features < 512


def test_what_is_included_is_all_that_loses_outputs():
    model = mlp()
    plan = shrink(model, X, 0.5, granularity=ANY, include=["2"])
    assert plan.groups == {"0.weight": (64, 64), "2.weight": (48, 24)}


def deep(widths=(16, 64, 96, 32, 64, 4)):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(4, 2))


@pytest.mark.parametrize("multiple_of", [8, 16])
def test_on_the_way_no_more_goes_than_the_budget_allows(multiple_of):
    """In coarse steps, nearly all of the ramp could cost less than its end, and what was cut would not come back."""
    for fraction in torch.linspace(0.2, 0.9, 15).tolist():
        budget = Budget(params=fraction, tolerance=0.05)
        pruner = pruner_of(deep(), budget=budget, granularity=Channel(multiple_of=multiple_of))
        for progress in (0.95, 0.99, 1.0):
            pruner.choose_(progress)
            assert pruner.contest.cost(pruner.choice) >= fraction - 0.05


@pytest.mark.parametrize("cuts_each", [True, False])
@pytest.mark.parametrize(
    ("widths", "budget", "multiple_of"),
    [
        ((16, 64, 48, 4), Budget(macs=0.5), 8),
        ((16, 64, 16, 4), Budget(macs=0.5), 16),
        ((16, 32, 16, 4), Budget(macs=0.6), 8),
        ((16, 48, 24, 4), Budget(params=0.8), 8),
        ((16, 32, 64, 4), Budget(params=0.5), 16),
    ],
)
def test_a_budget_in_coarse_steps_is_met_however_scores_move(widths, budget, multiple_of, cuts_each):
    """What went on the way does not come back, so the end must be one that what is left can still reach."""
    for seed in range(4):
        draw, granularity = torch.Generator().manual_seed(seed), Channel(multiple_of=multiple_of)
        pruner = pruner_of(model := deep(widths), budget=budget, granularity=granularity)
        for fraction in (0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 1.0):
            pruner.update_(fraction)
            if cuts_each:
                pruner.shrink_()
            with torch.no_grad():
                for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
                    layer.weight.mul_(torch.rand(len(layer.weight), 1, generator=draw) ** 3)
            pruner.apply_()
        assert pruner.missed is None
        assert pruner.contest.cost(pruner.choice) == pytest.approx(budget.fraction, abs=budget.tolerance)


def test_what_a_latency_needs_is_kept_though_other_channels_become_better(clock):
    pruner = pruner_of(model := mlp(), budget=Budget(latency=0.5), granularity=ANY)
    pruner.update_(0.1)
    solved = dict(pruner.contest.solved)
    with torch.no_grad():  # most of the first layer is worth little by now
        model[0].weight[8:] *= 1e-3
        model[2].weight[:, 8:] *= 1e-3
    pruner.update_(0.95)
    assert pruner.contest.counts(pruner.choice)["0.weight"] >= solved["0.weight"] > 8
    pruner.update_(1.0)
    assert pruner.contest.counts(pruner.choice) == solved


def test_a_latency_out_of_reach_is_refused_after_a_few_measurements(clock):
    with pytest.raises(
        ValueError, match=r"`budget` latency=0.5 is out of reach .* latency=0\.\d+ of the dense"
    ):
        shrink(deep(), X, budget=Budget(latency=0.5, tolerance=1e-6))
    assert 0 < len(clock) <= 3 * NUM_MEASURED


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_pruner_follows_what_another_one_cuts(is_masked):
    """Channels of other layers: it goes on as if it had begun with the smaller model."""
    model = mlp()
    first, second = (
        pruner_of(model, sparsity=0.5, include=["0"]),
        pruner_of(model, sparsity=0.5, include=["2"]),
    )
    if is_masked:
        second.update_(0.5)
    first.update_(1.0)
    second.follow_(first.shrink_())
    assert second.sparsity == (0.25 if is_masked else 0.0) and set(second.contest.sizes) == {"2.weight"}
    assert all(mask.shape == model.get_parameter(name).shape for name, mask in second.masks.items())
    again = pruner_of(model, sparsity=0.5, include=["2"])
    again.load_state_dict(second.state_dict())
    second.update_(1.0)
    plan = second.shrink_()
    assert plan.groups["0.weight"] == (32, 32) and plan.groups["2.weight"] == (48, 24)
    assert again.state_dict()["choice"].keys() == ({"2.weight"} if is_masked else set())
    assert model(X).shape == (3, 4)


def test_masks_of_a_group_that_another_pruner_cuts_are_cut_alike():
    model = mlp()
    first, second = pruner_of(model, sparsity=0.25, include=["0"]), pruner_of(model, sparsity=0.5)
    second.update_(1.0)
    before = {name: mask.clone() for name, mask in second.masks.items()}
    first.update_(1.0)
    plan = first.shrink_()
    second.follow_(plan)
    for name, mask in second.masks.items():
        assert torch.equal(mask, sliced(before[name], plan.slices.get(name, {})))
    assert second.num_groups == 112 and second.sparsity >= 0.5
    again = pruner_of(model, sparsity=0.5)
    again.load_state_dict(second.state_dict())
    assert again.sparsity == second.sparsity and again.masks.keys() == second.masks.keys()
