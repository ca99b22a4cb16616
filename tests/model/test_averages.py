"""Averages within a model: which submodules they are, and plans that are mirrored on them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune import Budget, Channel, Head, Layer, shrink
from lightning_prune.core.recipe import Recipe
from lightning_prune.graph import Plan, trace
from lightning_prune.model.averages import Copies, Verdict
from lightning_prune.model.calls import Call
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.skip import Skip
from lightning_prune.model.surgery import execute_


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0])


class Holder(nn.Module):
    """Runs its network; `more` are submodules beside it."""

    def __init__(self, net, **more):
        super().__init__()
        self.net = net
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.net(x)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def move_(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("make", "granularity", "x"),
    [(mlp, Channel(multiple_of=1), torch.randn(3, 8)), (Attending, Head(), torch.randn(3, 5, 16))],
    ids=["channels", "heads"],
)
def test_an_average_becomes_what_the_network_becomes(make, granularity, x):
    net = make()
    model = Holder(net, ema=copy.deepcopy(net))
    pruner = GroupPruner(model, Recipe(0.5, granularity=granularity), Call(model, (x,), {}))
    pruner.copies.watch(trains_on=True)
    move_(model.ema)
    alone = Holder(copy.deepcopy(model.ema))
    pruner.update_(1.0)
    plan = pruner.shrink_()
    own = {name: dims for name, dims in plan.slices.items() if name.startswith("net.")}
    parts = {
        part: {p: v for p, v in getattr(plan, part).items() if p.startswith("net")}
        for part in ("attributes", "replaced", "shapes")
    }
    execute_(alone, replace(plan, slices=own, **parts))
    assert own and type(model.ema) is type(alone.net)
    torch.testing.assert_close(model.ema.eval()(x), alone.net.eval()(x), rtol=0, atol=0)
    for name, tensor in alone.net.state_dict().items():
        assert torch.equal(model.ema.state_dict()[name], tensor)


def watched(**more):
    torch.manual_seed(0)
    net = mlp()
    model = Holder(net, **{name: make(net) for name, make in more.items()})
    copies = Copies(model, trace(model, (torch.randn(3, 8),)))
    copies.watch(trains_on=True)
    return model, copies


@pytest.mark.parametrize(
    ("make", "is_suspect"),
    [
        (copy.deepcopy, True),
        (lambda net: mlp(), True),  # an average that was loaded
        (lambda net: nn.Linear(8, 16), False),  # a layer that happens to have the sizes of another one
        (lambda net: copy.deepcopy(net[0]), True),
        (lambda net: net, False),  # the same parameters under another name
        (lambda net: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)), False),
    ],
)
def test_what_may_be_an_average(make, is_suspect):
    _, copies = watched(other=make)
    assert ("other" in copies.suspects) == is_suspect


def test_norms_at_their_first_values_tell_nothing():
    model, copies = watched(norm=lambda net: nn.BatchNorm1d(16))
    copies.joined(Plan({"net.1.weight": {0: (0,)}}, {"net.1.weight": (16,)}))
    assert not copies.suspects["norm"].is_alike and not copies.notes
    move_(model.norm)
    assert copies.averages() == {"norm": "net.1"}


def test_an_average_is_what_changes_without_gradients():
    model, copies = watched(ema=copy.deepcopy, teacher=copy.deepcopy, twin=lambda net: mlp())
    model.twin(torch.randn(3, 8)).sum().backward()
    copies.note_gradients()
    assert copies.averages() == {} and list(copies.suspects) == ["ema", "teacher"]
    move_(model.ema)
    assert copies.averages() == {"ema": "net"}


def test_where_it_is_not_clear_what_is_averaged_that_is_said():
    model, copies = watched(ema=lambda net: mlp(), twin=lambda net: mlp())
    model.twin(torch.randn(3, 8)).sum().backward()
    copies.note_gradients()
    copies.check()
    move_(model.ema)
    with pytest.raises(ValueError, match="`ema` is built as net, twin and changes without gradients"):
        copies.averages()


def test_a_state_is_restored():
    model, copies = watched(ema=copy.deepcopy)
    state = copies.state_dict()
    move_(model.ema)
    again = Copies(model, trace(model, (torch.randn(3, 8),)))
    again.watch(trains_on=True)
    assert again.averages() == {}
    again.load_state_dict(state)
    assert again.averages() == {"ema": "net"}


@pytest.mark.parametrize("early", [True, False])
def test_a_state_holds_what_has_changed_before(early):
    model, copies = watched(ema=copy.deepcopy)
    move_(model.ema)
    if early:
        assert copies.averages()
    again = watched(ema=copy.deepcopy)[1]
    again.model.load_state_dict(model.state_dict())
    again.load_state_dict(copies.state_dict())
    assert again.averages() == {"ema": "net"}


def test_a_copy_that_has_stayed_whole_is_an_average_of_nothing_any_more():
    """A teacher that is replaced by another one later."""
    model, copies = watched(teacher=copy.deepcopy)
    copies.is_seen = True
    plan = trace(model, (torch.randn(3, 8),)).plan({"net.0.weight": torch.arange(16) < 8})
    assert copies.joined(plan) == plan and len(copies.notes) == 1
    execute_(model, plan)
    move_(model.teacher)
    assert copies.averages() == copies.open == {}


def test_what_was_taken_out_of_the_model_is_no_average_any_more():
    model, copies = watched(ema=copy.deepcopy, other=copy.deepcopy)
    move_(model.ema), move_(model.other)
    del model.ema
    copies.note_gradients()
    assert copies.averages() == {"other": "net"}
    model.net = nn.Identity()
    assert copies.averages() == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda net, compiled: Holder(compiled, average=AveragedModel(net)),
        lambda net, compiled: Holder(compiled, average=AveragedModel(compiled)),
        lambda net, compiled: Holder(net, average=torch.compile(AveragedModel(net), backend="eager")),
        lambda net, compiled: Holder(net, average=AveragedModel(net, use_buffers=True)),
    ],
    ids=["net", "both", "average", "buffers"],
)
def test_what_is_compiled_or_averages_buffers_is_no_exception(make):
    net = mlp()
    model = make(net, torch.compile(net, backend="eager"))
    shrink(model, torch.randn(3, 8), **HALF)
    assert small(model.net) and small(model.average)


def small(net):
    return [tuple(p.shape) for p in net.parameters()] == [(8, 8), (8,), (8,), (8,), (4, 8), (4,)]


HALF = {"sparsity": 0.5, "granularity": Channel(multiple_of=1)}


@pytest.mark.parametrize("runs", ["net", "average"])
def test_in_one_shot_torchs_averages_follow_and_go_on_averaging(runs):
    class Reading(Holder):
        def forward(self, x):
            return getattr(self, runs)(x)

    torch.manual_seed(0)
    model, x = Reading(net := mlp(), average=AveragedModel(net)), torch.randn(3, 8)
    model.average.update_parameters(model.net)
    move_(model.average.module)
    other = "net" if runs == "average" else "average"
    expected = Holder(copy.deepcopy(model.get_submodule(other)))
    plan = shrink(model, x, **HALF)
    for name, dims in plan.slices.items():
        if name.startswith(f"{other}."):
            tensor = expected.get_parameter(name.replace(other, "net", 1)) if "running" not in name else None
            for dim, kept in dims.items() if tensor is not None else ():
                tensor.data = tensor.data[kept,] if dim == 0 else tensor.data[:, kept]
    for own, its in zip(model.get_submodule(other).parameters(), expected.net.parameters(), strict=True):
        assert torch.equal(own, its)
    assert small(model.net) and small(model.average.module)
    model.average.update_parameters(model.net)
    assert model.average(x).shape == model.net(x).shape


def nearby(net):
    ema = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.mul_(0.9)
    return ema


@pytest.mark.parametrize("make", [copy.deepcopy, nearby])
def test_in_one_shot_what_may_be_an_average_or_a_teacher_stays_and_that_is_said(make):
    model = Holder(net := mlp(), ema=make(net))
    before = copy.deepcopy(model.ema.state_dict())
    with pytest.warns(UserWarning, match="`ema` stays whole: it may be an average of net, or a teacher"):
        shrink(model, torch.randn(3, 8), **HALF)
    assert small(model.net) and all(torch.equal(model.ema.state_dict()[n], t) for n, t in before.items())


@pytest.mark.parametrize("make", [copy.deepcopy, nearby])
def test_in_one_shot_an_average_follows_that_is_named(make):
    model = Holder(net := mlp(), ema=make(net))
    outside = make(model)
    shrink(model, torch.randn(3, 8), **HALF, copies=[model.ema, outside])
    assert all(map(small, (model.net, model.ema, outside.net, outside.ema)))


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"teacher": nearby}, {"exclude": ["teacher"]}),
        ({"other": lambda net: mlp()}, {}),
        ({"layer": lambda net: nn.Linear(8, 16)}, {"exclude": ["layer"]}),
    ],
    ids=["excluded", "other", "layer"],
)
def test_in_one_shot_nothing_is_said_of_what_is_no_average(more, options):
    model = Holder(net := mlp(), **{name: make(net) for name, make in more.items()})
    (name,) = more
    sizes = [p.shape for p in model.get_submodule(name).parameters()]
    shrink(model, torch.randn(3, 8), **HALF, **options)
    assert small(model.net) and [p.shape for p in model.get_submodule(name).parameters()] == sizes


def test_what_cannot_be_an_average_is_refused():
    model = Holder(mlp(), other=nn.Linear(3, 3))
    with pytest.raises(ValueError, match="but got `other`, which is built as none"):
        shrink(model, torch.randn(3, 8), **HALF, copies=[model.other])
    assert model.net[0].out_features == 16


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x)


@pytest.mark.parametrize("budget", [None, Budget(params=0.5, tolerance=0.1)])
def test_blocks_that_are_left_out_are_left_out_of_averages(budget):
    torch.manual_seed(0)
    net = nn.Sequential(*[Residual() for _ in range(6)], nn.Linear(8, 4))
    model = Holder(net, average=AveragedModel(net))
    total = sum(p.numel() for p in model.parameters())
    shrink(model, torch.randn(3, 8), None if budget else 0.5, budget=budget, granularity=Layer())
    gone = [isinstance(block, Skip) for block in model.net]
    assert sum(gone) == 3 and gone == [isinstance(block, Skip) for block in model.average.module]
    if budget:
        assert sum(p.numel() for p in model.parameters()) / total == pytest.approx(0.5, abs=0.1)
    model.average.update_parameters(model.net)


@pytest.mark.parametrize("budget", [Budget(params=0.3), Budget(num_bytes=0.3)])
def test_a_budget_counts_averages_in_the_sizes_of_what_they_follow(budget):
    def cost(model):
        tensors = [*model.parameters(), *(model.buffers() if budget.kind == "num_bytes" else ())]
        return sum(t.numel() * (t.element_size() if budget.kind == "num_bytes" else 1) for t in tensors)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4))
    model = Holder(net, average=AveragedModel(net))
    dense = cost(model)
    shrink(model, torch.randn(3, 8), budget=budget, granularity=Channel(multiple_of=1))
    assert cost(model) / dense == pytest.approx(0.3, abs=0.02)


def watched_with_ema(params):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4))
    model = Holder(net, ema=copy.deepcopy(net))
    recipe = Recipe(None, granularity=Channel(multiple_of=1), budget=Budget(params=params))
    pruner = GroupPruner(model, recipe, Call(model, (torch.randn(3, 8),), {}))
    pruner.copies.watch(trains_on=True)
    return model, pruner


def test_a_budget_counts_with_what_may_still_follow_until_the_end():
    model, pruner = watched_with_ema(0.45)
    pruner.copies.is_seen = True
    pruner.update_(0.9)
    before = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model.ema[0].bias.add_(1)
    pruner.shrink_()
    left = sum(p.numel() for p in model.parameters()) / before
    assert pruner.contest.spent == pytest.approx(left, abs=1e-12)
    pruner.update_(1.0)
    pruner.shrink_()
    left = sum(p.numel() for p in model.parameters()) / before
    assert left == pytest.approx(0.45, abs=0.02) and pruner.missed is None
    assert pruner.contest.spent == pytest.approx(left, abs=1e-12)


def test_what_a_model_costs_is_told_by_what_has_followed():
    """Also where an average changes between the last choice and the surgery."""
    model, pruner = watched_with_ema(0.8)
    before = sum(p.numel() for p in model.parameters())
    pruner.update_(1.0)
    move_(model.ema)
    pruner.shrink_()
    left = sum(p.numel() for p in model.parameters()) / before
    assert left < 0.7 and pruner.contest.spent == pytest.approx(left, abs=1e-12)
    assert pruner.missed == f"Budget(params=0.8) is missed: params are {left:.3f} of the dense model's."


def test_equal_layers_of_a_frozen_part_are_no_averages_of_each_other():
    """As they are in a TransformerEncoder, which copies its layer; nor are tables that a step changes by hand."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    frozen = nn.Sequential(*(copy.deepcopy(layer) for _ in range(3))).requires_grad_(False)
    model, x = nn.Sequential(nn.Linear(8, 8), frozen, nn.Linear(8, 4)), torch.randn(3, 8)
    pruner = GroupPruner(model, Recipe(0.5, granularity=Channel(multiple_of=1)), Call(model, (x,), {}))
    pruner.copies.watch(trains_on=True)
    pruner.update_(0.5)
    frozen[0][0].bias.add_(1)
    assert pruner.copies.check() is False and pruner.copies.names(*Verdict) == {}
    pruner.update_(1.0)
    assert not pruner.shrink_().is_empty
