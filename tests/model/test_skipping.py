"""Blocks go only where the model without them does what it does when they add nothing; else they stay."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune import Budget, Layer, shrink
from lightning_prune.examples.networks import GPT, ResNet20
from lightning_prune.graph import trace
from lightning_prune.model import skipping
from lightning_prune.model.calls import call_of
from lightning_prune.model.history import plans_of
from lightning_prune.model.skip import Skip
from lightning_prune.model.skipping import settle_blocks

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Honest(nn.Module):
    def __init__(self, scale=10.0):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), scale

    def forward(self, x):
        return x + self.scale * self.linear(x)


class Small(Honest):
    """Changes its input least, so that it is the first to go."""

    def __init__(self):
        super().__init__(scale=1e-3)


class ScaledSkip(Small):
    def forward(self, x):
        return torch.add(self.scale * self.linear(x), x, alpha=0.5)


class DoubledSkip(Small):
    def forward(self, x):
        return x + (x + self.scale * self.linear(x))


class RectifiedInPlace(Small):
    def forward(self, x):
        return x.relu_() + self.scale * self.linear(x)


class ScaledInPlace(Small):
    def forward(self, x):
        return x.mul_(0.5) + self.scale * self.linear(x)


class LeavesSomething(Small):
    def forward(self, x):
        self.note = self.linear(x)
        return x + self.scale * self.note


class Noted(nn.Module):
    """Goes by what a block has left behind, if it has."""

    def __init__(self, block):
        super().__init__()
        self.block, self.linear = block, nn.Linear(4, 4)

    def forward(self, x):
        y = self.block(x)
        return self.linear(y) + getattr(self.block, "note", torch.zeros(1)).sum()


class AlsoByAnotherName(nn.Module):
    """Calls a block by a name under which it stays."""

    def __init__(self, block):
        super().__init__()
        self.block = self.called = block

    def forward(self, x):
        return self.called(x)


def model_of(first):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), first(), Honest(), nn.Linear(4, 2)).eval()


UNFIT = {
    "a scaled skip": (ScaledSkip, "1"),
    "a doubled skip": (DoubledSkip, "1"),
    "a ReLU in place on the skip": (RectifiedInPlace, "1"),
    "a factor in place on the skip": (ScaledInPlace, "1"),
    "something left behind": (lambda: Noted(LeavesSomething()), "1.block"),
    "another name": (lambda: AlsoByAnotherName(Small()), "1.block"),
}


@pytest.mark.parametrize(("first", "path"), UNFIT.values(), ids=UNFIT)
def test_a_block_that_is_no_plain_sum_stays_and_the_next_one_goes(first, path):
    model, reference = model_of(first), model_of(first)
    reference[2] = nn.Identity()
    assert path in trace(model, (X,)).blocks
    plan = shrink(model, X, 0.5, granularity=Layer())
    assert plan.replaced == {"2": "skip"} and plan.error is not None and plan.error < 1e-10
    assert torch.equal(model(X.clone()), reference(X.clone()))


@pytest.mark.parametrize(("first", "path"), UNFIT.values(), ids=UNFIT)
def test_it_is_frozen_with_a_reason_and_nothing_is_touched(first, path):
    model = model_of(first)
    state, tree = (
        copy.deepcopy(model.state_dict()),
        [(n, id(m), set(vars(m))) for n, m in model.named_modules()],
    )
    frozen, couplings = {}, trace(model, (X,))
    found = settle_blocks(
        couplings,
        call_of(model, X),
        lambda: {} if frozen else {path: couplings.blocks[path]},
        frozen.__setitem__,
    )
    assert found == ([], 0.0)
    assert frozen[path].startswith("the model without it would differ by ") and "e" in frozen[path]
    assert [(n, id(m), set(vars(m))) for n, m in model.named_modules()] == tree
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_norm_behind_the_sum_makes_it_no_block():
    class PostNorm(Honest):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(super().forward(x))

    model = nn.Sequential(nn.Linear(4, 4), PostNorm(), PostNorm())
    with pytest.raises(ValueError, match="has none that can go"):
        shrink(model, X, 0.5, granularity=Layer())


def test_a_branch_that_changes_the_stream_in_place_stays():
    class Stream(nn.Module):
        def __init__(self, *first):
            super().__init__()
            self.branch = nn.Sequential(*first, nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x):
            return x + 0.1 * self.branch(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Stream(nn.ReLU(inplace=True)), Stream(nn.Tanh()))
    with torch.no_grad():
        model[1].branch[2].weight.mul_(1e-3)
    plan = shrink(model, X, 0.5, granularity=Layer(unit="branch"))
    assert plan.replaced == {"2.branch": "zero"} and plan.error is not None and plan.error < 1e-10


@pytest.mark.parametrize(
    ("make", "x", "unit"),
    [
        (lambda: GPT(vocab_size=11), torch.arange(32).view(2, 16) % 11, "block"),
        (lambda: GPT(vocab_size=11), torch.arange(32).view(2, 16) % 11, "branch"),
        (ResNet20, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "block"),
    ],
)
def test_the_error_is_measured_and_recorded(make, x, unit, monkeypatch):
    torch.manual_seed(0)
    model, measured = make().eval(), []
    real = skipping.largest_difference
    monkeypatch.setattr(
        skipping, "largest_difference", lambda *a: (measured.append(real(*a)), measured[-1])[1]
    )
    plan = shrink(model, x, 0.5, granularity=Layer(unit=unit))
    assert measured == [plan.error] and plan.error < 1e-10
    assert plans_of(model) == (plan,)


def test_a_skip_that_does_something_else_would_not_pass(monkeypatch):
    """The masked model is computed without it: in its place is no `Skip`, but the block itself."""
    monkeypatch.setattr(Skip, "forward", lambda self, x: 1.001 * x)
    model = model_of(Small)
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="Nothing was removed"):
        plan = shrink(model, X, 0.5, granularity=Layer())
    assert plan.is_empty and not plans_of(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


class Shortened(nn.Module):
    """Torch's encoder, in a model that may differ from the one it is compared with."""

    def __init__(self, num_layers=4, **kwargs):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, **{"batch_first": True, "norm_first": True, **kwargs}
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=not layer.norm_first)

    def forward(self, x, mask=None):
        return self.encoder(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("options", [{}, {"norm_first": False}, {"bias": False}, {"batch_first": False}])
@pytest.mark.parametrize("is_masked", [False, True])
def test_branches_of_torchs_encoder_go_though_its_layers_read_them(options, is_masked):
    """`batch_first` and others, on the way to its fused kernel; without the attention it is on the slow path."""
    torch.manual_seed(0)
    model = Shortened(**options).eval()
    x = torch.randn(3, 3, 8)
    mask = torch.tensor([[False, False, True]] * 3) if is_masked else None
    silent = copy.deepcopy(model)
    plan = shrink(model, (x, mask), 0.5, granularity=Layer(unit="branch"))
    assert len(plan.replaced) == 2 and set(plan.replaced.values()) == {"zero2"} and plan.error < 1e-10
    for path in plan.replaced:
        attention = silent.get_submodule(path)
        nn.init.zeros_(attention.out_proj.weight)
        if attention.out_proj.bias is not None:
            nn.init.zeros_(attention.out_proj.bias)
    for mode in (False, True):
        kept = slice(0, 2) if is_masked else slice(None)
        with torch.no_grad():
            small, dense = model.train(mode)(x, mask), silent.train(mode)(x, mask)
        small, dense = (y[:, kept] if options.get("batch_first", True) else y for y in (small, dense))
        torch.testing.assert_close(small, dense)
    model(x, mask).sum().backward()


def test_a_skip_answers_for_plain_values_and_for_no_weight():
    class Attention(nn.Linear):
        is_causal = True

        def __init__(self):
            super().__init__(3, 3)
            self.window, self.notes, self.num_outputs = (2, 2), {"a": 1}, 7

    skip = Skip("zero2", Attention())
    assert (skip.in_features, skip.is_causal, skip.window, skip.bias) == (3, True, (2, 2), None)
    assert not any(hasattr(skip, name) for name in ("weight", "notes")) and not skip.state_dict()
    assert skip.num_outputs == 2 and skip.extra_repr() == ""


def test_why_no_block_goes_is_said():
    class Two(Small):
        def forward(self, x):
            return super().forward(x), self.linear(x)

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Two() for _ in range(4)])

        def forward(self, x):
            total = 0
            for block in self.blocks:
                x, more = block(x)
                total = total + more
            return total

    why = r"TypeError: unsupported .*; of the 2 that it returns, the first becomes its input and the rest None\)"
    with pytest.warns(
        UserWarning, match=rf"^Nothing was removed of the 4 blocks, where 2 were to go.*{why}"
    ) as said:
        assert shrink(Sums(), X, 0.5, granularity=Layer()).is_empty
    assert len(said) == 1
    with pytest.raises(ValueError, match=rf"`budget` .*out of reach.* What stays: .*{why}"):
        shrink(Sums(), X, budget=Budget(params=0.5), granularity=Layer())


def test_what_stays_of_several_is_said_and_what_min_keep_holds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), ScaledSkip(), ScaledSkip(), Honest(), nn.Linear(4, 2)).eval()
    said = r"^`sparsity` of 0.6667 is missed: 1 of the 3 blocks are gone\. What stays: `1`, `2` \(the model .*\)\.$"
    with pytest.warns(UserWarning, match=said):
        assert list(shrink(model, X, 2 / 3, granularity=Layer()).replaced) == ["3"]
    said = r"^Nothing was removed of the 2 blocks, where 1 were to go\. `min_keep` 2 lets no more go\.$"
    with pytest.warns(UserWarning, match=said):
        shrink(model_of(Small), X, 0.5, granularity=Layer(min_keep=2))


def test_the_other_unit_is_suggested_where_it_finds_some():
    encoder = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    with pytest.raises(ValueError, match=r'none that can go.* Layer\(unit="branch"\) finds 1.self_attn\.$'):
        shrink(encoder, X.view(1, 5, 4), 0.5, granularity=Layer())
    with pytest.raises(ValueError, match="on what it has returned.$"):
        shrink(nn.Linear(4, 4), X, 0.5, granularity=Layer())


def test_what_a_block_returns_besides_goes_with_it():
    class WithWeights(Small):
        def forward(self, x):
            return x + self.scale * self.linear(x), x.softmax(-1)

    class Collects(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([WithWeights(), WithWeights(), WithWeights()])

        def forward(self, x):
            weights = []
            for block in self.blocks:
                x, found = block(x)
                weights.append(found)
            return {"x": x, "weights": weights}

    torch.manual_seed(0)
    model = Collects()
    with torch.no_grad():
        model.blocks[1].linear.weight.zero_()
        model.blocks[1].linear.bias.zero_()
    plan = shrink(model, X, 1 / 3, granularity=Layer())
    assert plan.replaced == {"blocks.1": "skip2"} and plan.error == 0.0
    assert [found is None for found in model(X)["weights"]] == [False, True, False]


def test_a_model_that_knows_no_float64_is_compared_in_its_own_precision():
    class Fussy(Small):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return super().forward(x)

    model = model_of(Fussy)
    plan = shrink(model, X, 0.5, granularity=Layer())
    assert plan.replaced == {"1": "skip"} and plan.error is not None and plan.error < 1e-6
