import gzip
import io
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_prune.model.cost as cost_module
from lightning_prune.model.calls import Call, call_of, capture_call, replaying
from lightning_prune.model.cost import compare_with_dense, measure
from lightning_prune.model.latency import dense_twin
from lightning_prune.model.macs import count_macs


def cost_of(module, *args, **kwargs):
    return measure(module, Call(module, args, kwargs), latency=False)


def macs_of(cost):
    return {layer.name: layer.macs for layer in cost.layers}


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Projected(nn.Module):
    """Attention with projections, as transformers write it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        raise RuntimeError("not today\nnor tomorrow")


# ------------------------------------------------------------------ multiply-accumulates, counted by hand
@pytest.mark.parametrize(
    ("module", "shapes", "expected"),
    [
        (nn.Linear(3, 4), [(2, 3)], 2 * 3 * 4),
        (nn.Linear(3, 4), [(3,)], 3 * 4),
        (nn.Linear(3, 4, bias=False), [(3,)], 3 * 4),
        (nn.Linear(3, 4), [(2, 5, 3)], 2 * 5 * 3 * 4),
        (nn.Conv1d(3, 4, 5), [(2, 3, 9)], 2 * 4 * 5 * 3 * 5),  # 5 places left
        (nn.Conv2d(3, 4, 3), [(2, 3, 8, 8)], 2 * 4 * 6 * 6 * 3 * 9),
        (nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2), [(1, 4, 8, 8)], 8 * 4 * 4 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), [(1, 4, 8, 8)], 4 * 6 * 6 * 9),
        (nn.ConvTranspose2d(3, 4, 3), [(2, 3, 8, 8)], 2 * 3 * 8 * 8 * 4 * 9),
        (nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], 2 * 3 * 4 * 5),
        (nn.RNN(3, 4), [(5, 2, 3)], 5 * 2 * (3 * 4 + 4 * 4)),
        (nn.GRU(3, 4), [(5, 2, 3)], 5 * 2 * 3 * (3 * 4 + 4 * 4)),
        (nn.LSTM(3, 4), [(5, 2, 3)], 5 * 2 * 4 * (3 * 4 + 4 * 4)),
        (nn.LSTM(3, 4, 2, bidirectional=True), [(5, 2, 3)], 5 * 2 * 4 * 2 * (3 * 4 + 4 * 4 + 8 * 4 + 4 * 4)),
        (nn.LSTM(3, 4, proj_size=2), [(5, 2, 3)], 5 * 2 * (4 * 4 * (3 + 2) + 4 * 2)),
        (nn.LSTMCell(3, 4), [(2, 3)], 2 * 4 * 4 * (3 + 4)),
        # projections of 5 x 2 tokens, then scores and values: 2 samples, 2 heads, 5 x 5 pairs of width 4, twice
        (nn.MultiheadAttention(8, 2, batch_first=True), [(2, 5, 8)] * 3, 10 * 4 * 8 * 8 + 2 * 2 * 25 * 4 * 2),
        (nn.MultiheadAttention(8, 2), [(5, 2, 8)] * 3, 10 * 4 * 8 * 8 + 2 * 2 * 25 * 4 * 2),
        (Projected(), [(2, 5, 8)], 10 * 4 * 8 * 8 + 2 * 2 * 25 * 4 * 2),
        (Attention(), [(2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 6)], 2 * 2 * 5 * 7 * (4 + 6)),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            [(2, 5, 8)],
            10 * 4 * 8 * 8 + 2 * 2 * 25 * 4 * 2 + 10 * 2 * 8 * 16,
        ),
        (nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.LayerNorm((3,)), nn.Dropout()), [(2, 3)], 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_are_those_counted_by_hand(module, shapes, expected):
    cost = cost_of(module, *(torch.randn(shape) for shape in shapes))
    assert cost.macs == cost.effective_macs == expected
    assert cost.unmeasured == {"latency": "not asked for"}


def test_macs_of_a_packed_sequence_are_those_of_its_tokens():
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), [5, 3])
    assert cost_of(nn.LSTM(3, 4), packed).macs == (5 + 3) * 4 * (3 * 4 + 4 * 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_macs_of_a_module_that_is_called_with_a_view_of_a_parameter(mode):
    """As DETR's decoder is with its queries: such a view requires a gradient, and without gradients none comes."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.decoder = (
                nn.Embedding(5, 4),
                nn.TransformerDecoderLayer(4, 2, 8, batch_first=True),
            )

        def forward(self, memory):
            return self.decoder(self.queries.weight.unsqueeze(0).expand(len(memory), -1, -1), memory)

    model, memory = Queries().eval(), torch.randn(2, 3, 4)
    with mode():
        found = count_macs(model, lambda: model(memory))
    plain = count_macs(model.decoder, lambda: model.decoder(torch.randn(2, 5, 4), memory))
    assert found.total == plain.total > 0
    cost = cost_of(model, memory)
    assert cost.macs == found.total and "macs" not in cost.unmeasured


def test_macs_go_to_the_weights_that_take_part():
    cost = cost_of(nn.MultiheadAttention(8, 2, batch_first=True), *[torch.randn(2, 5, 8)] * 3)
    assert macs_of(cost) == {"in_proj_weight": 10 * 3 * 64, "out_proj.weight": 10 * 64}
    cost = cost_of(nn.LSTM(3, 4), torch.randn(5, 2, 3))
    assert macs_of(cost) == {"weight_ih_l0": 10 * 16 * 3, "weight_hh_l0": 10 * 16 * 4}


def test_weights_are_known_by_what_they_are_and_not_by_their_name_in_the_called_module():
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(3, 4))
    call = Call(nn.Sequential(model[1], nn.Linear(4, 5)), (torch.ones(2, 3),), {})
    cost = measure(model, call, latency=False)
    assert (cost.macs, macs_of(cost)) == (24 + 40, {"0.weight": 0, "1.weight": 24})


def test_a_weight_that_the_call_does_not_use_has_none_to_do():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2), nn.Linear(7, 7))
    net.forward = lambda x: net[1](net[0](x))
    assert macs_of(cost_of(net, torch.tensor([1, 2, 3]))) == {"0.weight": 0, "1.weight": 24, "2.weight": 0}


@pytest.mark.parametrize("wrap", ["prune", "weight_norm", "autocast"])
def test_macs_find_weights_that_were_masked_normalised_or_cast(wrap):
    linear, autocast = nn.Linear(3, 4), None
    with torch.no_grad():
        linear.weight[:, 1:] = 0.0  # two thirds of each row
    if wrap == "prune":
        with torch.no_grad():
            linear.weight.fill_(1.0)
        from torch.nn.utils import prune

        prune.custom_from_mask(linear, "weight", torch.tensor([[1.0, 0.0, 0.0]] * 4))
    elif wrap == "weight_norm":
        nn.utils.parametrizations.weight_norm(linear)
    else:
        autocast = ("cpu", torch.bfloat16)
    cost = measure(linear, Call(linear, (torch.randn(2, 3),), {}, autocast), latency=False)
    assert (cost.macs, cost.effective_macs) == (24, 8)
    assert sorted(macs_of(cost).values())[-1] == 24


def test_an_activation_of_the_shape_of_a_weight_is_no_weight():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.linear = nn.Parameter(torch.ones(1, 2, 3)), nn.Linear(3, 4)

        def forward(self, x):
            return self.linear(x + self.position) @ torch.ones(4, 4)

    assert macs_of(cost_of(Added(), torch.randn(1, 2, 3))) == {"position": 0, "linear.weight": 24}
    assert cost_of(Added(), torch.randn(1, 2, 3)).macs == 24 + 32


def test_effective_macs_multiply_those_of_a_weight_by_its_density():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10))
    with torch.no_grad():
        net[0].weight[0] = 0.0
    cost = cost_of(net, torch.randn(2, 4))
    assert cost.macs == 2 * (16 + 40)
    assert cost.effective_macs == 2 * (16 * 3 // 4 + 40)


def test_an_operator_without_a_formula_is_named_instead_of_counted_as_nothing():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.randn(30, 3))

        def forward(self, x):
            return torch.cdist(x, self.centres, compute_mode="donot_use_mm_for_euclid_dist")

    cost = cost_of(Distances(), torch.randn(2, 3))
    assert cost.macs is None and cost.effective_macs is None
    assert "no formula for _cdist_forward" in cost.unmeasured["macs"]


@pytest.mark.parametrize("dim", [-1, 0])
def test_a_norm_of_vectors_is_no_product(dim):
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return (F.normalize(self.a(x), dim=dim) * F.normalize(self.b(x), dim=dim)).sum(-1)

    cost = measure(model := Towers(), call_of(model, torch.randn(2, 8)), latency=False)
    assert cost.macs == 2 * 2 * 8 * 4 and "macs" not in cost.unmeasured


def test_an_operator_from_outside_of_torch_is_named():
    with torch.library._scoped_library("lightning_prune_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")

        class Foreign(nn.Module):
            def __init__(self, *, on_weight):
                super().__init__()
                self.linear, self.on_weight = nn.Linear(3, 4), on_weight

            def forward(self, x):
                double = torch.ops.lightning_prune_test.double
                return x @ double(self.linear.weight).T if self.on_weight else double(self.linear(x))

        after, on_weight = (cost_of(Foreign(on_weight=flag), torch.randn(2, 3)) for flag in (False, True))
    assert (after.macs, "lightning_prune_test::double" in after.unmeasured["macs"]) == (24, True)
    assert (on_weight.macs, "lightning_prune_test::double" in on_weight.unmeasured["macs"]) == (None, True)


def test_the_transformer_fast_path_is_switched_on_again():
    assert torch.backends.mha.get_fastpath_enabled()
    net = Raises()
    with pytest.raises(RuntimeError):
        count_macs(net, lambda: net(1))
    assert torch.backends.mha.get_fastpath_enabled()


# ------------------------------------------------------------------ parameters, bytes
def test_tied_weights_count_once():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.Linear(10, 2))
    net[1].weight = net[0].weight
    cost = cost_of(net, torch.tensor([1, 2]))
    assert cost.params == 40 + 22
    assert macs_of(cost) == {"0.weight": 2 * 40, "2.weight": 2 * 20}


def test_nonzeros():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[:2] = 0.0
        net[1].bias[0] = -0.0
        net[1].weight[0, 0] = float("nan")
    cost = measure(net)
    assert (cost.params, cost.nonzeros) == (16 + 10, 26 - 6 - 1)
    assert [(x.name, x.shape, x.params, x.nonzeros) for x in cost.layers] == [
        ("0.weight", (4, 3), 12, 6),
        ("1.weight", (2, 4), 8, 8),
    ]
    assert cost.sparsity == pytest.approx(7 / 26)


def test_bytes_are_those_of_the_file():
    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    torch.save(net.state_dict(), file := io.BytesIO())
    cost = measure(net)
    assert cost.num_bytes == len(file.getvalue())
    assert cost.gzip_bytes == pytest.approx(len(gzip.compress(file.getvalue(), compresslevel=6)), abs=64)


def test_only_gzip_sees_zeros():
    net = nn.Linear(128, 128)
    before = measure(net)
    with torch.no_grad():
        net.weight[:, :115] = 0.0
    after = measure(net)
    assert after.num_bytes == before.num_bytes
    assert after.gzip_bytes < before.gzip_bytes / 3


def test_gzip_is_skipped_for_large_models_and_says_so(monkeypatch):
    monkeypatch.setattr(cost_module, "MAX_GZIP_BYTES", 2**20)
    cost = measure(nn.Linear(1024, 512))
    assert cost.num_bytes > 2**20 and cost.gzip_bytes is None
    assert cost.unmeasured["gzip_bytes"] == "skipped above 1 MiB"


def test_what_has_no_values_or_no_shape_is_not_measured():
    with torch.device("meta"):
        meta = nn.Linear(3, 4)
    cost = measure(meta)
    assert (cost.params, cost.nonzeros, cost.sparsity) == (16, None, None)
    assert "meta" in cost.unmeasured["nonzeros"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))
    cost = measure(lazy)
    assert cost.params == 9 and "1.weight" in cost.unmeasured["params"]


# ------------------------------------------------------------------ nothing is changed
class Stateful(nn.Module):
    """Everything that a forward may leave behind."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.5), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(4).eval()
        self.register_buffer("counted", torch.zeros(()))
        self.register_buffer("replaced", torch.full((2,), float("nan")))
        self.num_switches = 0

    def train(self, mode=True):
        self.num_switches = getattr(self, "num_switches", 0) + 1
        return super().train(mode)

    def forward(self, x):
        self.counted += 1
        self.replaced = self.replaced + torch.rand(2) + random.random() + np.random.rand()
        x.add_(1.0)
        return self.frozen(self.net(x))


def snapshot(model):
    return {
        "flags": [m.training for m in model.modules()],
        "buffers": [(id(b), b.clone()) for b in model.buffers()],
        "switches": model.num_switches,
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("latency", [True, False])
def test_measuring_changes_nothing(latency):
    model = Stateful().train()
    model.frozen.eval()
    batch = torch.randn(5, 3)
    kept, before = batch.clone(), snapshot(model)
    cost = measure(model, Call(model, (batch,), {}), latency=latency)
    after = snapshot(model)
    assert cost.macs == 5 * 12 and (cost.latency is not None) is latency
    np.testing.assert_equal(after.pop("numpy"), before.pop("numpy"))
    for (key_before, value_before), (key_after, value_after) in zip(
        before.pop("buffers"), after.pop("buffers"), strict=True
    ):
        assert key_before == key_after
        torch.testing.assert_close(value_after, value_before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    assert torch.equal(batch, kept)


def test_a_call_that_raises_leaves_everything_as_it_was():
    model = Raises().train()
    call = Call(model, (torch.ones(1),), {})
    with pytest.raises(RuntimeError, match="not today"), replaying(model, call) as replay:
        replay()
    assert model.training and torch.is_grad_enabled()


def test_a_forward_that_raises_is_a_reason_and_no_zero():
    model = Raises()
    cost = measure(model, Call(model, (torch.ones(1),), {}))
    assert cost.macs is None and cost.effective_macs is None and cost.latency is None
    assert set(cost.unmeasured.values()) == {"RuntimeError: not today"}
    assert (cost.params, cost.nonzeros is None, cost.num_bytes is None) == (6, False, False)


def test_without_a_call_the_reason_is_said():
    cost = measure(nn.Linear(2, 2))
    assert cost.macs is None and cost.latency is None and cost.batch_size is None
    assert cost.unmeasured["macs"] == cost.unmeasured["latency"] == "no call of the model was seen"


# ------------------------------------------------------------------ catching a call
class Outer(nn.Module):
    """As LightningModules are: the forward of the whole is never called."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
        self.small = nn.Linear(3, 2)
        self.loss = nn.MSELoss()

    def training_step(self, x):
        return self.loss(self.net(x), self.small(x))


def test_a_list_of_images_is_a_batch_of_them():
    pictures = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)]
    assert call_of(nn.Identity(), (pictures, [{"boxes": torch.zeros(5, 4)}])).batch_size == 2
    assert call_of(nn.Identity(), {"images": pictures}).batch_size == 2
    assert call_of(nn.Identity(), ([torch.zeros(5, 3), torch.zeros(5, 4)],)).batch_size == 5


def test_the_outermost_module_with_the_most_parameters_is_caught():
    model, x = Outer(), torch.randn(5, 3, requires_grad=True)
    with capture_call(model) as caught:
        model.training_step(x).backward()
    call = caught.call
    assert call.module is model.net and call.batch_size == 5
    assert torch.equal(call.args[0], x) and not call.args[0].requires_grad
    assert call.args[0].data_ptr() != x.data_ptr()
    assert all(not m._forward_pre_hooks for m in model.modules())
    cost = measure(model, call, latency=False)
    assert macs_of(cost) == {"net.0.weight": 60, "net.1.1.weight": 40, "small.weight": 0}


def test_nothing_is_caught_where_nothing_runs():
    with capture_call(Outer()) as caught:
        pass
    assert caught.call is None


def test_a_loss_or_metric_is_no_model():
    with capture_call(model := Outer()) as caught:
        model.loss(torch.ones(2), torch.ones(2))
    assert caught.call is None


def test_hooks_are_gone_when_the_batch_raises():
    model = Raises()
    with pytest.raises(RuntimeError), capture_call(model):
        model(1)
    assert not model._forward_pre_hooks


def test_a_student_is_caught_before_its_larger_teacher():
    model = nn.ModuleDict({"teacher": nn.Linear(9, 99).requires_grad_(False), "student": nn.Linear(9, 3)})
    with capture_call(model) as caught:
        model["teacher"](torch.ones(1, 9)), model["student"](torch.ones(1, 9))
    assert caught.call.module is model["student"]
    with capture_call(model.requires_grad_(False)) as caught:
        model["student"](torch.ones(1, 9)), model["teacher"](torch.ones(1, 9))
    assert caught.call.module is model["teacher"]


def test_nested_arguments_are_copied():
    class Nested(nn.Linear):
        def forward(self, batch, *, scale):
            return super().forward(batch["x"][0]) * scale[1]

    model, x = Nested(3, 2), torch.randn(4, 3)
    with capture_call(model) as caught:
        expected = model({"x": [x], "name": "train"}, scale=(1, torch.tensor(2.0)))
    x.zero_()
    assert torch.equal(caught.call(), expected)
    assert caught.call.batch_size == 4 and caught.call.args[0]["name"] == "train"


def test_a_call_caught_in_inference_mode_or_under_autocast_can_be_replayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.inference_mode(), capture_call(model) as caught:
        model(torch.randn(5, 3))
    assert measure(model, caught.call, latency=False).macs == 60
    with torch.autocast("cpu", torch.bfloat16), capture_call(model) as caught:
        model(torch.randn(5, 3, dtype=torch.bfloat16))  # fails outside of autocast
    assert caught.call.autocast == ("cpu", torch.bfloat16)
    assert measure(model, caught.call, latency=False).macs == 60


def test_a_step_that_stands_in_for_forward_is_not_taken_for_it():
    """Lightning's DDP lets `forward` be `training_step` while it is called."""
    model = Outer()
    model.forward = lambda x: model.training_step(x)
    with capture_call(model) as caught:
        model(torch.randn(5, 3))
    assert caught.call.module is model.net


def test_a_compiled_module_is_caught_whole_and_counted():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = nn.ModuleDict({"net": torch.compile(net, backend="eager")})
    with capture_call(model) as caught:
        model["net"](torch.randn(5, 3))
    assert caught.call.module is model["net"]
    assert macs_of(measure(model, caught.call, latency=False)) == {
        "net._orig_mod.0.weight": 60,
        "net._orig_mod.2.weight": 40,
    }


# ------------------------------------------------------------------ latency
def test_latency_is_measured_on_one_thread():
    net = nn.Linear(64, 64)
    latency = measure(net, Call(net, (torch.randn(8, 64),), {})).latency
    assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms
    assert (latency.device, latency.num_threads, latency.clock) == ("cpu", 1, "cpu")
    assert latency.num_measurements >= 5


def test_a_call_that_takes_too_long_is_not_repeated(monkeypatch):
    monkeypatch.setattr("lightning_prune.model.latency.MAX_SECONDS", 0.0)
    net = nn.Linear(64, 64)
    cost = measure(net, Call(net, (torch.randn(8, 64),), {}))
    assert cost.latency is None and "too long to repeat" in cost.unmeasured["latency"]


def test_a_device_that_cannot_be_timed_is_refused():
    with torch.device("meta"):
        net = nn.Linear(3, 4)
    cost = measure(net, Call(net, (torch.randn(8, 3, device="meta"),), {}))
    assert cost.latency is None and "`device` is cpu or cuda" in cost.unmeasured["latency"]


def test_masked_and_dense_are_measured_in_turns():
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        net[0].weight[:20] = 0.0
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    call = Call(net, (torch.randn(4, 32),), {})
    costs = measure(net, call, latency=False), measure(net, call, latency=False)
    before, after = compare_with_dense(net, call, *costs)
    assert before.latency and after.latency and before.latency != after.latency
    assert before.unmeasured == after.unmeasured == {}
    assert (before.macs, after.macs) == (costs[0].macs, costs[1].macs)
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert bool((dense_twin(call).module[0].weight != 0).all())


def test_the_dense_twin_computes_about_the_same():
    """Or else it would run through other branches, and take another time for that reason."""
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.9)
    call = Call(net, (torch.rand(32, 784),), {})
    twin = dense_twin(call)
    assert all(bool((p != 0).all()) for p in twin.module.parameters())
    with torch.no_grad():
        expected, found = call(), twin()
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_a_comparison_that_fails_is_a_reason():
    model = Raises()
    before, after = compare_with_dense(model, Call(model, (1,), {}), measure(model), measure(model))
    assert before.latency is after.latency is None
    assert before.unmeasured["latency"] == after.unmeasured["latency"] == "RuntimeError: not today"
