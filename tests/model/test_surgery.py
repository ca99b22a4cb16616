"""Surgery: the small model trains on exactly as one that was built small by hand, and a failure leaves no trace."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.graph import Plan, Scale
from lightning_prune.model import optimizer as optimizer_module
from lightning_prune.model import surgery
from lightning_prune.model.history import plans_of
from lightning_prune.model.surgery import execute_

KEPT = (0, 2, 3, 7)  # of the 8 channels between both convolutions
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamw-capturable-steps": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}


class Net(nn.Module):
    """Two convolutions, norm, an attribute of one's own, and a head that reads the second's 6 channels at 4 places."""

    def __init__(self, hidden=8):
        super().__init__()
        self.hidden = hidden
        self.first, self.norm = nn.Conv2d(3, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.second, self.head = nn.Conv2d(hidden, 6, 3, padding=1), nn.Linear(24, 5)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, hidden), persistent=False)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x))) * self.gain.view(1, self.hidden, 1, 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.second(x)), 2).flatten(1))


def dense(seed=0):
    torch.manual_seed(seed)
    return Net()


def plan_of(kept=KEPT, **others):
    along = {"first.weight": 0, "first.bias": 0, "second.weight": 1, "gain": 0}
    along |= dict.fromkeys(["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"], 0)
    model = dense()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Plan(
        {name: {dim: kept} for name, dim in along.items()},
        {name: tuple(t.shape) for name, t in tensors.items()},
        {"": {"hidden": len(kept)}},
        groups={"first.weight": (8, len(kept))},
        **others,
    )


def cut_by_hand(tensor, dim, kept=KEPT):
    return torch.stack([tensor.select(dim, i) for i in kept], dim).clone()


def small_by_hand(model, plan=None):
    plan = plan or plan_of()
    small = Net(len(KEPT))
    with torch.no_grad():
        new, old = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (small, model))
        for name, tensor in old.items():
            for dim in plan.slices.get(name, {}):
                tensor = cut_by_hand(tensor.detach(), dim)
            new[name].copy_(tensor)
    return small


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def values(model):
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_as_that_of_a_model_built_small(build):
    model, plan = dense(), plan_of()
    optimizer = build(model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    small = small_by_hand(model)
    theirs = build(small.parameters())
    for (name, old), new in zip(model.named_parameters(), small.parameters(), strict=True):
        state = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[old].items()}
        for dim in plan.slices.get(name, {}):
            for key, value in state.items():
                if torch.is_tensor(value) and value.dim() == old.dim() and value.shape[dim] == old.shape[dim]:
                    state[key] = cut_by_hand(value, dim)
        theirs.state[new] = state
    before = list(model.parameters())
    execute_(model, plan, optimizers=[optimizer])
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for n, p in model.named_parameters() if n in plan.slices)
    for seed in range(3, 8):
        assert_same(values(model), values(small))
        step(model, optimizer, seed)
        step(small, theirs, seed)
    assert_same(values(model), values(small))
    assert any(
        not torch.equal(p, q)
        for p, q in zip(model.parameters(), small_by_hand(dense()).parameters(), strict=True)
    )


def test_forwards_agree_with_the_model_that_is_masked():
    model, plan = dense().double().eval(), plan_of()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in [*masked.named_parameters(), *masked.named_buffers()]:
            for dim in plan.slices.get(name, {}):
                gone = [i for i in range(8) if i not in KEPT]
                tensor.index_fill_(dim, torch.tensor(gone), 0.0)
        masked.norm.running_var[gone] = 1.0
    execute_(model, plan)
    assert (
        model.first.out_channels == model.norm.num_features == model.second.in_channels == model.hidden == 4
    )
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)


def test_scales_come_before_the_cut():
    model, plan = (
        dense(),
        plan_of(scales=(Scale("first.weight", 0, (2, 3, 4), 0.5), Scale("head.bias", 0, (1,), 3.0))),
    )
    expected = model.first.weight.detach().clone()
    expected[2:5] *= 0.5
    bias = model.head.bias.detach() * torch.tensor([1.0, 3, 1, 1, 1])
    execute_(model, plan)
    assert torch.equal(model.first.weight, expected[list(KEPT)]) and torch.equal(model.head.bias, bias)


def test_tied_parameters_are_cut_once_and_stay_tied():
    net = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10, bias=False))
    net[1].weight = net[0].weight
    before = net[0].weight.detach().clone()
    execute_(net, Plan({"0.weight": {1: (1, 4)}}, {"0.weight": (10, 6)}))
    assert net[1].weight is net[0].weight and torch.equal(net[0].weight, before[:, [1, 4]])
    assert net[0].embedding_dim == 2
    assert net(torch.tensor([1, 2])).shape == (2, 10)


def test_the_memory_format_stays():
    model = dense().to(memory_format=torch.channels_last)
    execute_(model, plan_of())
    assert model.second.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.second.weight.is_contiguous()
    model = dense()
    execute_(model, plan_of())
    assert model.second.weight.is_contiguous()


def test_averages_of_the_weights_are_cut_alike():
    model = dense()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update_parameters(model)
    average.update_parameters(dense(5))
    expected = values(small_by_hand(average.module))
    execute_(model, plan_of(), copies=[average.module])
    assert_same(values(average.module), expected)
    assert plans_of(average.module) == plans_of(model)
    average.update_parameters(model)
    assert average.module(torch.ones(1, 3, 8, 8)).shape == (1, 5) and average.module.hidden == 4


def test_a_model_is_pruned_again():
    model = dense()
    x = torch.randn(2, 3, 8, 8)
    direct = copy.deepcopy(model)
    execute_(model, plan_of())
    again = plan_of((1, 3))
    shapes = {n: again.shapes[n] if n not in again.slices else plan_of().shape_after(n) for n in again.shapes}
    execute_(model, Plan(again.slices, shapes, again.attributes))
    execute_(direct, plan_of((2, 7)))
    assert torch.equal(model.eval()(x), direct.eval()(x))
    assert len(plans_of(model)) == 2 and len(plans_of(direct)) == 1


def test_a_graph_that_lives_on_does_not_hold_the_old_shape():
    model = dense()
    model.train()
    kept_alive = model(torch.randn(2, 3, 8, 8)).sum()
    seen = []
    model.first.weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    execute_(model, plan_of())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert seen == [(4, 3, 3, 3)] and kept_alive.grad_fn is not None


# what other optimizers remember


def test_lbfgs_starts_anew_and_says_so():
    model = dense()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, 8, 8)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.warns(UserWarning, match="LBFGS remembers one flat history .* starts anew"):
        execute_(model, plan_of(), optimizers=[optimizer])
    assert not optimizer.state
    optimizer.step(closure)


class Odd(torch.optim.SGD):
    """Remembers what cannot be cut."""


def test_what_cannot_be_cut_starts_anew_and_says_so():
    model = dense()
    optimizer = Odd(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer, 0)
    optimizer.state[model.first.weight]["blocks"] = torch.zeros(7)
    with pytest.warns(
        UserWarning, match=r"Odd remembers `blocks` of shape \(7,\) for first.weight of shape \(8, 3, 3, 3\)"
    ):
        execute_(model, plan_of(), optimizers=[optimizer])
    assert model.first.weight not in optimizer.state
    assert optimizer.state[model.second.weight]["momentum_buffer"].shape == (6, 4, 3, 3)
    step(model, optimizer, 1)


@pytest.mark.parametrize(("key", "lost"), [("exp_avg_sq_row", 1), ("exp_avg_sq_col", 0)])
def test_rows_and_columns_without_the_other_dim(key, lost):
    """As Hugging Face's Adafactor has them: for a square weight only the name tells one from the other."""
    layer = nn.Linear(6, 6, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    optimizer.state[layer.weight][key] = torch.arange(6.0)
    execute_(layer, Plan({"weight": {0: (1, 5), 1: (0, 2, 3)}}, {"weight": (6, 6)}), optimizers=[optimizer])
    assert optimizer.state[layer.weight][key].tolist() == ([1, 5] if lost == 1 else [0, 2, 3])


def test_an_optimizer_of_other_weights_is_left_alone():
    model, other = dense(), nn.Linear(2, 2)
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    execute_(model, plan_of(), optimizers=[optimizer])
    after = optimizer.state_dict()
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())


# all or nothing


def everything(models, optimizers):
    """All that surgery could change, by value and by identity."""
    found = {}
    for i, model in enumerate(models):
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            found[i, name] = (id(t), t.detach().clone(), t.data_ptr(), t.stride())
            found[i, name, "grad"] = None if t.grad is None else (id(t.grad), t.grad.clone())
        for path, module in model.named_modules():
            plain = {k: v for k, v in vars(module).items() if not k.startswith("_") or "prune" in k}
            found[i, path, "module"] = (id(module), type(module), plain, list(vars(module)))
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state.items():
            found |= {
                ("state", i, id(p), k): (id(v), v.clone() if torch.is_tensor(v) else v)
                for k, v in state.items()
            }
    return found


def is_same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def assert_untouched(before, after):
    assert before.keys() == after.keys()
    assert [key for key in before if not is_same(before[key], after[key])] == []


class Whole(nn.Module):
    """Something of everything: attention, a block to skip, norm, own attributes."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.Sequential(nn.Linear(8, 8))
        self.grow, self.shrink = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return x + self.shrink(F.relu(self.grow(self.block(x))))


def whole_plan():
    keep_dims = (0, 1, 4, 5)  # two of four in each of two heads
    model = Whole()
    packed = tuple(i + 8 * part for part in range(3) for i in keep_dims)
    kept = tuple(range(5))
    return Plan(
        {
            "attention.in_proj_weight": {0: packed},
            "attention.in_proj_bias": {0: packed},
            "attention.out_proj.weight": {1: keep_dims},
            "grow.weight": {0: kept},
            "grow.bias": {0: kept},
            "shrink.weight": {1: kept},
        },
        {name: tuple(p.shape) for name, p in model.named_parameters()},
        {"attention": {"head_dim": 2, "value_dim": 2}, "": {"width": 5}},
        (Scale("grow.weight", 0, (0,), 2.0),),
        {"attention": "attention", "block": "skip"},
    )


def trained_whole():
    torch.manual_seed(0)
    model = Whole()
    optimizers = [
        torch.optim.AdamW(model.parameters(), 0.01),
        torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
    ]
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(2, 3, 8)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers, copy.deepcopy(model)


STAGES = [
    (surgery, "check_fits"),
    (surgery, "scaled"),
    (surgery, "sliced"),
    (surgery, "_set_"),
    (surgery, "make_flexible_"),
    (surgery, "sizes_of"),
    (surgery, "replace_"),
    (surgery, "Skip"),
    (surgery, "cut_state_"),
    (optimizer_module, "_cut"),
    (surgery, "note_"),
]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("module", "name"), STAGES, ids=[name for _, name in STAGES])
def test_a_failure_at_any_stage_undoes_everything(monkeypatch, module, name, late):
    """Each stage fails at its last call: before it did its work, or right after."""
    real, calls = getattr(module, name), []
    model, optimizers, average = trained_whole()
    monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    execute_(*copy.deepcopy((model, whole_plan())), optimizers=(), copies=[copy.deepcopy(average)])
    if "cut" in name:
        execute_(model, whole_plan(), optimizers=optimizers, copies=[average])
        model, optimizers, average = trained_whole()
    last, calls[:] = len(calls), []
    before = everything([model, average], optimizers)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) != last:  # what undoes it may use the same function
            return real(*args, **kwargs)
        if late:
            real(*args, **kwargs)
        raise MemoryError("injected")

    monkeypatch.setattr(module, name, failing)
    with pytest.raises(MemoryError, match="injected"):
        execute_(model, whole_plan(), optimizers=optimizers, copies=[average])
    monkeypatch.undo()
    assert_untouched(before, everything([model, average], optimizers))
    execute_(model, whole_plan(), optimizers=optimizers, copies=[average])
    assert model(torch.randn(1, 3, 8)).shape == (1, 3, 8)


def test_the_snapshot_notices_surgery():
    """The negative control of the test above."""
    model, optimizers, average = trained_whole()
    before = everything([model, average], optimizers)
    execute_(model, whole_plan(), optimizers=optimizers)
    with pytest.raises(AssertionError):
        assert_untouched(before, everything([model, average], optimizers))


def test_a_failing_warning_undoes_everything():
    model = dense()
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.state[next(model.parameters())]["d"] = torch.zeros(3)
    before = everything([model], [optimizer])
    with pytest.raises(UserWarning, match="starts anew"):  # warnings are errors in these tests
        execute_(model, plan_of(), optimizers=[optimizer])
    assert_untouched(before, everything([model], [optimizer]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(3, 8), "got Linear, which has no first.bias, first.weight, gain"),
        (
            lambda: Net(hidden=9),
            r"first.weight has the shape \(8, 3, 3, 3\), but got Net with \(9, 3, 3, 3\)",
        ),
    ],
)
def test_another_model_is_refused(model, message):
    other = model()
    before = everything([other], [])
    with pytest.raises(ValueError, match=message):
        execute_(other, plan_of())
    assert_untouched(before, everything([other], []))


def test_another_copy_is_refused_before_anything_changes():
    model, other = dense(), Net(hidden=9)
    before = everything([model, other], [])
    with pytest.raises(ValueError, match="belongs to another model"):
        execute_(model, plan_of(), copies=[other])
    assert_untouched(before, everything([model, other], []))


def test_a_plan_is_carried_out_once():
    model = dense()
    execute_(model, plan_of())
    with pytest.raises(ValueError, match="or was carried out already"):
        execute_(model, plan_of())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"attributes": {"first": {"no_such": 3}}}, "got no_such for first, a Conv2d without"),
        ({"attributes": {"gone": {"n": 3}}}, "which has no gone"),
        ({"replaced": {"gone": "skip"}}, "which has no gone"),
        ({"replaced": {"first": "attention"}}, "nn.MultiheadAttention, but got Conv2d for first"),
        ({"replaced": {"": "skip"}}, "but got the model itself"),
    ],
)
def test_what_a_model_does_not_have_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        execute_(dense(), Plan({}, {}, **parts))


# modules of torch keep their sizes right

MODULES = [
    (lambda: nn.Conv1d(4, 6, 3), {"weight": {0: 4, 1: 2}, "bias": {0: 4}}, nn.Conv1d(2, 4, 3)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), {"weight": {0: 4}, "bias": {0: 4}}, nn.Conv2d(4, 4, 3, groups=2)),
    (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        {"weight": {0: 2, 1: 4}, "bias": {0: 4}},
        nn.ConvTranspose2d(2, 4, 3),
    ),
    (lambda: nn.Conv3d(4, 6, 3), {"weight": {0: 4, 1: 2}, "bias": {0: 4}}, nn.Conv3d(2, 4, 3)),
    (lambda: nn.Linear(4, 6), {"weight": {0: 4, 1: 2}, "bias": {0: 4}}, nn.Linear(2, 4)),
    (lambda: nn.Bilinear(4, 5, 6), {"weight": {0: 4, 2: 2}, "bias": {0: 4}}, nn.Bilinear(4, 2, 4)),
    (lambda: nn.LayerNorm(6), {"weight": {0: 4}, "bias": {0: 4}}, nn.LayerNorm(4)),
    (lambda: nn.RMSNorm(6), {"weight": {0: 4}}, nn.RMSNorm(4)),
    (lambda: nn.GroupNorm(2, 6), {"weight": {0: 4}, "bias": {0: 4}}, nn.GroupNorm(2, 4)),
    (lambda: nn.Embedding(6, 5), {"weight": {1: 4}}, nn.Embedding(6, 4)),
    (lambda: nn.EmbeddingBag(6, 5), {"weight": {1: 4}}, nn.EmbeddingBag(6, 4)),
    (lambda: nn.PReLU(6), {"weight": {0: 4}}, nn.PReLU(4)),
]
NORM = {"running_mean": {0: 4}, "running_var": {0: 4}}
MODULES += [
    (lambda: nn.BatchNorm1d(6), {"weight": {0: 4}, "bias": {0: 4}, **NORM}, nn.BatchNorm1d(4)),
    (lambda: nn.BatchNorm2d(6, affine=False), NORM, nn.BatchNorm2d(4, affine=False)),
]


def sizes(module):
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}


@pytest.mark.parametrize(
    ("build", "cuts", "small"), MODULES, ids=[type(small).__name__ for _, _, small in MODULES]
)
def test_sizes_follow_the_weights(build, cuts, small):
    module = build()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    slices = {name: {dim: tuple(range(size)) for dim, size in dims.items()} for name, dims in cuts.items()}
    execute_(module, Plan(slices, {name: tuple(tensors[name].shape) for name in slices}))
    assert sizes(module) == sizes(small)
    assert repr(module) == repr(small)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers_lose_hidden_units(kind):
    torch.manual_seed(0)
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[kind]
    net, small = getattr(nn, kind)(3, 4, num_layers=2), getattr(nn, kind)(2, 3, num_layers=2)
    kept, slices = (0, 1, 3), {}
    rows = tuple(4 * gate + i for gate in range(gates) for i in kept)
    for layer in range(2):
        slices[f"weight_ih_l{layer}"] = {0: rows, 1: (0, 2) if layer == 0 else kept}
        slices[f"weight_hh_l{layer}"] = {0: rows, 1: kept}
        slices |= {f"bias_ih_l{layer}": {0: rows}, f"bias_hh_l{layer}": {0: rows}}
    with torch.no_grad():
        for name, p in small.named_parameters():
            value = net.get_parameter(name).detach()
            for dim, indices in slices[name].items():
                value = value.index_select(dim, torch.tensor(indices))
            p.copy_(value)
    execute_(net, Plan(slices, {n: tuple(p.shape) for n, p in net.named_parameters()}))
    assert sizes(net) == sizes(small)
    x = torch.randn(5, 1, 2)
    assert torch.equal(net(x)[0], small(x)[0])


def test_a_skipped_block_hands_on_its_input():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())).eval()
    x = torch.randn(3, 2)
    expected = net[0](x)
    execute_(net, Plan({}, {"1.0.weight": (2, 2)}, replaced={"1": "skip"}))
    assert torch.equal(net(x), expected) and not net[1].training
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias"]


def test_a_skipped_block_keeps_the_form_of_its_output():
    class Block(nn.Module):
        def forward(self, x, mask=None):
            return x + 1, mask, 3

    net = nn.ModuleDict({"block": Block()})
    execute_(net, Plan({}, {}, replaced={"block": "skip3"}))
    x = torch.ones(2)
    assert net["block"](x, mask=x) == (x, None, None)


def test_attention_loses_width_and_keeps_its_scale():
    """The small attention is the masked one, whose scores are divided by the root of 4, not of 2."""
    model, _, _ = trained_whole()
    attention = model.attention.double().eval()
    reference = copy.deepcopy(attention)
    gone = torch.tensor([i for i in range(24) if i % 4 > 1])
    with torch.no_grad():
        reference.in_proj_weight[gone] = 0
        reference.in_proj_bias[gone] = 0
    execute_(model, whole_plan())
    x = torch.randn(2, 5, 8, dtype=torch.double)
    expected, weights = reference(x, x, x)
    result, shown = model.attention(x, x, x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shown, weights, rtol=1e-12, atol=1e-12)
    wrong = F.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 2),) * 3)
    assert math.isclose(float(wrong.sum()), 4.0)


def test_no_fast_path_goes_around_the_small_attention():
    """In eval mode `nn.TransformerEncoderLayer` hands weights to a kernel that takes dense widths for granted."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    keep = (0, 1, 4, 5)
    packed = tuple(i + 8 * part for part in range(3) for i in keep)
    slices = {"self_attn.in_proj_weight": {0: packed}, "self_attn.in_proj_bias": {0: packed}}
    slices["self_attn.out_proj.weight"] = {1: keep}
    plan = Plan(
        slices,
        {n: tuple(p.shape) for n, p in layer.named_parameters()},
        {"self_attn": {"head_dim": 2, "value_dim": 2}},
        replaced={"self_attn": "attention"},
    )
    execute_(layer, plan)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x).detach())
