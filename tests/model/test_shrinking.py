"""`shrink`: sparsities, budgets, heads and blocks on the example networks, against counts of the real small model."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_prune
from lightning_prune import (
    Budget,
    Channel,
    Global,
    Head,
    Isomorphic,
    Layer,
    Local,
    Wanda,
    Weight,
    prune,
    shrink,
)
from lightning_prune.examples.networks import GPT, ConvNet, LeNet5, ResNet20
from lightning_prune.graph import trace
from lightning_prune.model.calls import Call
from lightning_prune.model.history import plans_of
from lightning_prune.model.prices import cost_function
from lightning_prune.model.surgery import execute_
from tests.members import members

TOKENS = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(kind, **settings):
    torch.manual_seed(0)
    return kind(**settings).eval()


def gpt():
    return build(GPT, vocab_size=11)


def params(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("scope", [Local(), Global(), Isomorphic()], ids=str)
def test_half_of_the_channels_leave_a_third_or_less_of_the_weights(scope):
    model = build(ResNet20)
    before = params(model)
    plan = shrink(model, IMAGES, 0.5, scope=scope, granularity=Channel(multiple_of=1))
    sizes, kept = zip(*plan.groups.values(), strict=True)
    assert sum(kept) == pytest.approx(0.5 * sum(sizes), abs=len(sizes))
    assert 0.15 < params(model) / before < 0.45
    assert plan.error is not None and plan.error < 1e-10
    assert model(IMAGES).shape == (2, 10)


@pytest.mark.parametrize("fraction", [0.7, 0.5, 0.25])
@pytest.mark.parametrize("kind", ["params", "macs", "num_bytes"])
@pytest.mark.parametrize(
    ("make", "x"), [(lambda: build(ResNet20), IMAGES), (gpt, TOKENS)], ids=["resnet", "gpt"]
)
def test_a_budget_is_met_within_two_percent(make, x, kind, fraction):
    """Counted on the real small model by torch's own counter, not by the types that predicted it."""
    model = make()
    cost = {
        "params": params,
        "macs": lambda m: macs(m, x),
        "num_bytes": lambda m: sum(t.numel() * t.element_size() for t in m.state_dict().values()),
    }[kind]
    before = cost(model)
    shrink(model, x, budget=Budget(**{kind: fraction}))
    assert cost(model) / before == pytest.approx(fraction, abs=0.02)


def test_a_budget_out_of_reach_names_the_nearest_and_changes_nothing():
    model = build(ResNet20)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"`budget` params=0.001 is out of reach .* params=0\.\d+ of the dense model"
    ):
        shrink(model, IMAGES, budget=Budget(params=0.001, tolerance=0.0001))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_latency_is_measured_on_smaller_copies(monkeypatch):
    """Here the clock is the number of weights, so that the test asks for no quiet machine; the rest is real."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    before, calls = params(model), []

    def ratio(dense, small, precision):
        assert precision == 0.025
        calls.append([params(dense.module), params(small.module)])
        return calls[-1][1] / calls[-1][0]

    monkeypatch.setattr("lightning_prune.model.prices.latency_ratio", ratio)
    shrink(model, torch.randn(8, 64), budget=Budget(latency=0.5, tolerance=0.05))
    assert params(model) / before == pytest.approx(0.5, abs=0.05)
    assert all(dense == before and small <= before for dense, small in calls)


def test_a_latency_is_real_time():
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 10))
    x = torch.randn(64, 256)
    couplings, call = trace(model, (x,)), Call(model, (x,), {})
    cost = cost_function(Budget(latency=0.5), couplings, call)
    assert 0 < cost({"0.weight": 16}) < 1.5 and cost({"0.weight": 1024}) == 1.0


def test_heads_go_as_wholes():
    model = gpt()
    plan = shrink(model, TOKENS, 0.5, granularity=Head(), scope=Local())
    assert [block.attention.num_heads for block in model.blocks] == [2] * 4
    assert model.blocks[0].attention.qkv.weight.shape == (3 * 2 * 32, 128)
    assert plan.error is not None and plan.error < 1e-10 and model(TOKENS).shape == (2, 16, 11)


def test_heads_lose_width_evenly_or_not_at_all():
    for heads, width in (("dim", 16), ("keep", 32)):
        model = gpt()
        shrink(model, TOKENS, 0.5, granularity=Channel(heads=heads), scope=Local())
        assert model.blocks[0].attention.num_heads == 4
        assert model.blocks[0].attention.qkv.weight.shape == (3 * 4 * width, 64)


def test_the_blocks_that_change_least_are_skipped_and_the_rest_is_untouched():
    model = gpt()
    with torch.no_grad():
        for name in ("attention.out", "shrink"):
            model.blocks[2].get_submodule(name).weight.mul_(1e-3)
    reference = copy.deepcopy(model)
    reference.blocks = nn.Sequential(*(block for i, block in enumerate(reference.blocks) if i != 2))
    before = params(model)
    plan = shrink(model, TOKENS, 0.25, granularity=Layer())
    assert plan.replaced == {"blocks.2": "skip"}
    assert params(model) == params(reference) < before
    torch.testing.assert_close(model(TOKENS), reference(TOKENS), rtol=0, atol=0)


def test_where_no_block_can_go_nothing_is_recorded():
    model = build(GPT, vocab_size=11, num_layers=1)
    with pytest.warns(UserWarning, match="Nothing was removed: of the 1 that compete"):
        plan = shrink(model, TOKENS, 0.5, granularity=Layer())
    assert plan.is_empty and not plans_of(model)


def test_the_branches_that_turn_the_stream_least_are_left_out_and_the_rest_is_untouched():
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True) for _ in range(3)]
    model, x = (
        nn.Sequential(nn.Linear(3, 16), *map(Branches, layers), nn.Linear(16, 2)).eval(),
        torch.randn(4, 5, 3),
    )
    with torch.no_grad():
        for layer in (model[1].attention.inner.out_proj, model[3].mlp[2]):
            layer.weight.mul_(1e-3)
            layer.bias.zero_()
        reference = copy.deepcopy(model)
        for layer in (reference[1].attention.inner.out_proj, reference[3].mlp[2]):
            layer.weight.zero_()
            layer.bias.zero_()
    dense = copy.deepcopy(model)
    plan = shrink(model, x, 1 / 3, granularity=Layer(unit="branch"))
    assert plan.replaced == {"1.attention": "zero", "3.mlp": "zero"}
    assert params(model) < params(reference)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-6)
    execute_(dense, plan)
    assert torch.equal(dense(x), model(x))


class Branches(nn.Module):
    """The two branches of a transformer layer, each a module."""

    def __init__(self, layer):
        super().__init__()
        self.attention, self.mlp = Attention(layer), nn.Sequential(layer.linear1, nn.ReLU(), layer.linear2)
        self.norm = layer.norm1

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


class Attention(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = layer.self_attn

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_a_block_that_the_model_needs_stays_and_the_next_one_goes():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = Pair(1e-3), Pair(1.0), nn.Linear(4, 2)

        def forward(self, x):
            x, weights = self.a(x)
            return self.head(self.b(x + weights.sum())[0])

    class Pair(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 4), scale

        def forward(self, x):
            return x + self.scale * self.linear(x), x.softmax(-1)

    model = Uses()
    plan = shrink(model, torch.randn(3, 4), 0.5, granularity=Layer())
    assert plan.replaced == {"b": "skip2"}
    assert model(torch.randn(3, 4)).shape == (3, 2)


@pytest.mark.parametrize("unit", ["block", "branch"])
def test_a_model_without_residual_blocks_is_refused(unit):
    with pytest.raises(ValueError, match="ConvNet has none that can go"):
        shrink(build(ConvNet), torch.zeros(2, 1, 8, 8), 0.5, granularity=Layer(unit=unit))


@pytest.mark.parametrize("criterion", members("criterion"), ids=str)
def test_every_criterion_ranks_channels(criterion):
    needs = lightning_prune.core.criteria.required_statistics(criterion)
    if "movement" in needs:
        pytest.skip("a sum over training")
    has_norms = "norm_scale" in needs
    model = build(ConvNet if has_norms else LeNet5)
    x, y = torch.randn(8, 1, *[8 if has_norms else 28] * 2), torch.arange(8) % 10

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch), y)

    plan = shrink(model, x, 0.5, criterion=criterion, scope=Local(), batches=[x], loss=loss)
    assert plan.groups and all(0 < kept < size for size, kept in plan.groups.values())
    assert plan.error is not None and plan.error < 1e-10


def test_wanda_keeps_the_channels_whose_inputs_are_large():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Identity(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[::2] *= 5
        model[2].weight.fill_(1.0)
    plan = shrink(model, x := torch.ones(3, 4), 0.5, criterion=Wanda(), batches=[x], include=["0", "2"])
    assert plan.slices["2.weight"] == {1: (0, 2, 4, 6)}


def test_optimizers_go_on_with_the_smaller_model():
    model = build(LeNet5).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(8, 1, 28, 28), torch.arange(8) % 10
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step == 0:
            shrink(model, x, 0.5, optimizers=[optimizer])
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert int(optimizer.state[parameter]["step"]) == 3


def test_excluded_layers_keep_their_outputs():
    model = build(LeNet5)
    plan = shrink(model, torch.randn(2, 1, 28, 28), 0.5, exclude=["features.0"])
    assert model.features[0].out_channels == 20 and "features.0.weight" not in plan.slices


def test_coupled_granularities_are_told_where_to_go():
    with pytest.raises(ValueError, match=r"taken out by `shrink\(model, example"):
        prune(build(LeNet5), 0.5, granularity=Channel())


def test_nothing_to_prune_says_what_is_frozen_and_why():
    with pytest.raises(
        ValueError, match=r"finds nothing to prune in Linear\. Frozen are .*output of the model"
    ):
        shrink(nn.Linear(4, 4), torch.zeros(2, 4), 0.5)


def reason_of(model, x, **kwargs):
    with pytest.raises(ValueError, match="finds nothing to prune") as said:
        shrink(model, x, 0.5, **kwargs)
    return str(said.value).partition("finds nothing to prune in ")[2]


def convolutions(wrap):
    layers = [
        wrap(nn.Conv1d(4, 16, 3)),
        nn.ReLU(),
        wrap(nn.Conv1d(16, 16, 3)),
        nn.ReLU(),
        nn.Conv1d(16, 3, 1),
    ]
    return nn.Sequential(*layers)


def test_a_network_without_attention_is_told_that_it_has_no_heads():
    found = reason_of(convolutions(lambda layer: layer), torch.randn(2, 4, 9), granularity=Head())
    assert found == "Sequential. No attention runs in it, so it has no heads: Channel() prunes channels."


def test_reasons_are_told_once_and_what_every_model_has_comes_last():
    found = reason_of(convolutions(nn.utils.parametrizations.weight_norm), torch.randn(2, 4, 9))
    assert found == (
        "Sequential. Frozen are `4.weight[1]` (weight norm divides by the norm of each row), `4.weight[0]` (output of "
        "the model). The weights of `0`, `2` are computed from others, by weight_norm or a parametrization: remove "
        "that, or, but for weight_norm, name what they are computed from in `include`."
    )


class SplitByWidth(nn.Module):
    """Attention whose heads must be as many as go into the width of the stream."""

    def __init__(self):
        super().__init__()
        self.width, self.num_heads = 16, 4
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        batch, length, width = x.shape
        shape = batch, length, self.num_heads, width // self.num_heads
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).split(self.width, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_what_could_not_follow_is_told_first():
    found = reason_of(SplitByWidth(), torch.randn(2, 5, 16), granularity=Head())
    assert found.startswith("SplitByWidth. Frozen are `qkv.weight[head]` (hard-coded size in ")


def test_what_exclude_keeps_is_no_fault_of_the_model():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert reason_of(net, torch.ones(2, 4), exclude=["0"]).startswith(
        "Sequential. Frozen are `0.weight` (`include` or `exclude` keeps it, or it is frozen), `2.weight[0]` (output "
        "of the model)."
    )


def test_what_makes_no_model_smaller_is_refused_by_shrink():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"`granularity` is of coupled groups, .*got Weight\(\).*`prune`"):
        shrink(net, torch.randn(1, 4), 0.5, granularity=Weight())
