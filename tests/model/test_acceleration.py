"""Sparse kernels are used where they are faster, and nowhere else; the clock tells, not a rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import NofM, SparseLinear, accelerate, densify, prune, to_semi_structured
from lightning_prune.model import acceleration, kernels
from lightning_prune.model.calls import Call
from lightning_prune.model.kernels import measure_kernels
from lightning_prune.model.semi_structured import why_not_semi_structured
from lightning_prune.report.costs import Latency

QUICK = {"seconds": 0.005}


class Net(nn.Module):
    """Two wide layers, one of them used twice, one that is never called and one that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.shared = nn.Linear(128, 128), nn.Linear(128, 128)
        self.also, self.idle, self.head = self.shared, nn.Linear(128, 128), nn.Linear(128, 3)

    def forward(self, x, scale=1.0):
        return {"y": self.head(self.also(self.shared(self.wide(x).relu()))) * scale}


def net(sparsity: float = 0.95) -> Net:
    torch.manual_seed(0)
    model = Net()
    for name in ("wide", "shared", "idle"):
        prune(model, sparsity, include=[name])
    return model


def clock(monkeypatch, *, layers=(4.0, 1.0), model=(4.0, 1.0)):
    """Let the clock say what a test needs; the real one is used in the other tests, which claim nothing of it."""

    def says(times):
        def measure(*calls, seconds):
            for call in calls:
                call()
            return tuple(Latency(t, 0.9 * t, 1.1 * t, 9) for t in times)

        return measure

    monkeypatch.setattr(kernels, "measure_latencies", says(layers))
    monkeypatch.setattr(acceleration, "measure_latencies", says(model))


def reasons(found):
    return {layer.name: layer.reason for layer in found.layers}


def test_what_is_faster_is_converted_and_computes_the_same(monkeypatch):
    clock(monkeypatch)
    model, x = net(), torch.randn(6, 5, 128)
    state, wanted = model.state_dict(), model(x)["y"]
    found = accelerate(model, {"x": x, "scale": 2.0})
    assert found.is_converted and found.num_converted == 2 and found.error < 1e-6 and found.batch_size == 6
    assert reasons(found) == {"wide": None, "shared": None, "idle": "not called", "head": "too small to pay"}
    assert [layer.num_rows for layer in found.layers][:2] == [30, 30] and found.layers[0].speedup == 4.0
    assert found.layers[0].sparsity == pytest.approx(0.95, abs=1e-4)
    assert (
        isinstance(model.wide, SparseLinear) and model.also is model.shared and type(model.idle) is nn.Linear
    )
    assert model.training and model.wide.training
    torch.testing.assert_close(model.eval()(x)["y"], wanted)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[n], t) for n, t in state.items())
    assert densify(model) == ("wide", "shared")
    Net().load_state_dict(after)


@pytest.mark.parametrize(
    "times", [{"layers": (1.0, 1.0)}, {"layers": (1.0, 4.0)}, {"model": (1.0, 1.0)}, {"model": (1.0, 1.05)}]
)
def test_nothing_is_converted_where_it_does_not_pay(monkeypatch, times):
    clock(monkeypatch, **times)
    model = net()
    modules = dict(model.named_modules())
    found = accelerate(model, torch.randn(6, 128))
    assert not found.is_converted and found.num_converted == 0
    assert dict(model.named_modules()) == modules


def test_the_real_clock_gives_numbers_and_leaves_the_model_alone():
    model, x = net(), torch.randn(4, 128)
    modules = dict(model.named_modules())
    found = measure_kernels(model, Call(model, (x,), {}), **QUICK)
    assert dict(model.named_modules()) == modules and model.training
    assert all(layer.dense.median_ms > 0 and layer.sparse.median_ms > 0 for layer in found.layers[:2])
    one = measure_kernels(model, Call(model, (x,), {}), max_layers=1, **QUICK)
    assert reasons(one)["shared"] == "only the 1 largest are measured"
    assert accelerate(model, x, **QUICK).kernel == "csr"


def test_what_is_not_sparse_is_not_measured():
    found = accelerate(net(0.4), torch.randn(4, 128), **QUICK)
    assert reasons(found)["wide"] == "less than 50 % sparse" and not found.is_converted


def test_layers_that_other_code_reads_are_left_alone():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 2, 256, batch_first=True), 1)
    prune(model, 0.95)
    found = reasons(accelerate(model, torch.randn(2, 3, 128), **QUICK))
    assert found["layers.0.linear1"] == "read by a fused kernel of torch"
    assert found["layers.0.self_attn.out_proj"] == "a NonDynamicallyQuantizableLinear, no plain nn.Linear"
    lone = nn.Linear(128, 128)
    assert reasons(accelerate(lone, torch.randn(2, 128), **QUICK))[""].startswith("the model itself")
    model = net()
    model.wide.register_forward_hook(lambda *_: None)
    found = reasons(accelerate(model, torch.randn(2, 128), exclude=["shared"], **QUICK))
    assert found["wide"] == "has hooks" and found["shared"] == "excluded"


def test_a_dtype_without_a_kernel_is_told():
    found = accelerate(net().bfloat16(), torch.randn(4, 128).bfloat16(), **QUICK)
    assert "not implemented for 'BFloat16'" in reasons(found)["wide"] and not found.is_converted


def test_a_model_that_would_compute_something_else_is_left_as_it_was(monkeypatch):
    clock(monkeypatch)

    class Nosy(Net):
        def forward(self, x):
            return super().forward(x)["y"] + self.wide.weight.is_sparse_csr

    model = Nosy()
    model.load_state_dict(net().state_dict())
    modules = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=r"`tolerance` of the outputs is 0.0001, but got .* with sparse kernels"
    ):
        accelerate(model, torch.randn(2, 128))
    assert dict(model.named_modules()) == modules

    class Broken(Net):
        def forward(self, x):
            return super().forward(x)["y"] + self.wide.weight.view(-1)[0]

    model = Broken()
    model.load_state_dict(net().state_dict())
    with pytest.raises(ValueError, match="`model` runs with sparse kernels, but got .*`exclude`"):
        accelerate(model, torch.randn(2, 128))
    assert type(model.wide) is nn.Linear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 0}, "`seconds` is a number above 0"),
        ({"tolerance": -1}, "`tolerance` is a number above 0"),
        ({"exclude": ["wid"]}, "`exclude`.*wid.*wide"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        accelerate(net(), torch.randn(2, 128), **settings)


# semi-structured


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(32, 64), "float32: sparse tensor cores take"),
        (torch.zeros(32, 64, dtype=torch.int8), "int8: sparse tensor cores take"),
        (torch.zeros(33, 64).half(), r"of shape \(33, 64\): rows are a multiple of 32, columns of 64"),
        (torch.zeros(32, 96).bfloat16(), r"of shape \(32, 96\)"),
        (torch.ones(32, 64).half(), "more than two of four"),
    ],
)
def test_weights_that_tensor_cores_do_not_take(weight, reason):
    import re

    assert re.match(reason, why_not_semi_structured(weight))


def test_weights_pruned_two_of_four_are_taken():
    model = nn.Sequential(nn.Linear(128, 64))
    prune(model, scope=NofM(2, 4))
    assert why_not_semi_structured(model[0].weight.half()) is None


def test_other_devices_are_refused_with_advice():
    with pytest.raises(
        ValueError, match=r"compute capability 8.0 and above.*but got one on cpu. On CPUs, `accelerate`"
    ):
        to_semi_structured(nn.Sequential(nn.Linear(128, 64)), torch.zeros(2, 128))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="no such GPU"
)
def test_the_conversion_on_a_gpu_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096)).cuda().half()
    prune(model, scope=NofM(2, 4))
    x = torch.randn(1024, 4096, device="cuda").half()
    with torch.no_grad():
        wanted = model(x)
        found = to_semi_structured(model, x)
        assert found.kernel == "2:4" and found.layers[0].dense.clock == "wall"
        assert (model(x) - wanted).abs().max() / wanted.abs().max() < 1e-2
