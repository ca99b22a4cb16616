"""Each statistic against numpy on the inputs and outputs themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.model.statistics import Statistics
from lightning_prune.model.targets import select_targets

ACTIVATIONS = ["input_norm", "output_mean", "output_positive", "output_variance"]


def collect(model, names, *inputs, include=None, times=1):
    targets = select_targets(model, include=include)
    statistics = Statistics(model, targets, names)
    with statistics.watch():
        for _ in range(times):
            model(*inputs)
    return statistics.read(), targets


def test_linear_against_numpy():
    layer, x = nn.Linear(5, 3), torch.randn(4, 7, 5)
    stats, _ = collect(layer, ACTIVATIONS, x)
    flat, out = x.reshape(-1, 5).numpy(), layer(x).detach().reshape(-1, 3).numpy()
    found = {k: v.numpy() for k, v in stats["weight"].items()}
    np.testing.assert_allclose(found["input_norm"], np.linalg.norm(flat, axis=0)[None], rtol=1e-5)
    np.testing.assert_allclose(found["output_mean"], np.abs(out).mean(0)[:, None], rtol=1e-5)
    np.testing.assert_allclose(found["output_positive"], (out > 0).mean(0)[:, None], rtol=1e-6)
    np.testing.assert_allclose(found["output_variance"], out.var(0)[:, None], rtol=1e-5)


def test_a_variance_far_from_zero_is_exact():
    layer = nn.Linear(1, 1)
    nn.init.ones_(layer.weight), nn.init.constant_(layer.bias, 1e4)
    x = torch.tensor([[-1.0], [1.0]]).repeat(500, 1)
    stats, _ = collect(layer, ["output_variance"], x, times=2)
    assert float(stats["weight"]["output_variance"]) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution_input_norm_is_that_of_the_channel_each_weight_sees(groups):
    layer, x = nn.Conv2d(4, 8, 3, groups=groups), torch.randn(2, 4, 6, 6)
    stats, targets = collect(layer, ["input_norm", "output_mean"], x)
    norm = stats["weight"]["input_norm"].expand(targets["weight"].shape).numpy()
    channel = np.sqrt((x.numpy() ** 2).sum((0, 2, 3)))
    per_group = 4 // groups
    for out in range(8):
        for i in range(per_group):
            seen = channel[(out // (8 // groups)) * per_group + i]
            np.testing.assert_allclose(norm[out, i], seen, rtol=1e-5)
    mean = np.abs(layer(x).detach().numpy()).mean((0, 2, 3))
    np.testing.assert_allclose(stats["weight"]["output_mean"].flatten(), mean, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups):
    layer, x = nn.ConvTranspose1d(4, 6, 3, groups=groups), torch.randn(2, 4, 5)
    stats, targets = collect(layer, ["input_norm", "output_mean"], x)
    norm, mean = (
        stats["weight"][k].expand(targets["weight"].shape).numpy() for k in ("input_norm", "output_mean")
    )
    channel, output = np.sqrt((x.numpy() ** 2).sum((0, 2))), np.abs(layer(x).detach().numpy()).mean((0, 2))
    for i in range(4):
        for o in range(6 // groups):
            np.testing.assert_allclose(norm[i, o], channel[i], rtol=1e-5)
            np.testing.assert_allclose(
                mean[i, o], output[(i // (4 // groups)) * (6 // groups) + o], rtol=1e-5
            )


def test_attention_projections_see_query_key_and_value():
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    targets = {n: p for n, p in select_targets(layer).items() if not n.startswith("out_proj")}
    statistics = Statistics(layer, targets, ["input_norm"])
    with statistics.watch():
        layer(q, key=k, value=v)
    for name, x in {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}.items():
        np.testing.assert_allclose(
            statistics.read()[name]["input_norm"][0], x.flatten(0, 1).norm(dim=0), rtol=1e-5
        )


def test_several_batches_and_shared_layers_add_up():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    once, _ = collect(layer, ["input_norm", "output_mean"], x)
    twice, _ = collect(layer, ["input_norm", "output_mean"], x, times=2)
    torch.testing.assert_close(twice["weight"]["input_norm"], once["weight"]["input_norm"] * 2**0.5)
    torch.testing.assert_close(twice["weight"]["output_mean"], once["weight"]["output_mean"])
    net = nn.Sequential(layer, layer)
    shared, _ = collect(net, ["input_norm"], x)
    expected = torch.cat([x, layer(x)]).detach().norm(dim=0)
    torch.testing.assert_close(shared["0.weight"]["input_norm"][0], expected)


class Grouped(nn.Module):
    """A weight that a plain and a grouped convolution share, which see one and two channels."""

    def __init__(self):
        super().__init__()
        self.plain, self.grouped = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, groups=2)
        self.grouped.weight = self.plain.weight

    def forward(self, x):
        return self.grouped(self.plain(x))


def test_layers_of_other_widths_share_a_weight():
    net, x = Grouped(), torch.randn(3, 1, 8, 8)
    stats, _ = collect(net, ACTIVATIONS, x)
    first = net.plain(x).detach()
    seen = [torch.cat([x.flatten(), first[:, channel].flatten()]).norm() for channel in range(2)]
    torch.testing.assert_close(stats["plain.weight"]["input_norm"].flatten(), torch.stack(seen))
    outputs = torch.cat([t.movedim(1, -1).flatten(0, -2) for t in (first, net.grouped(first).detach())])
    for kind, expected in {
        "output_mean": outputs.abs().mean(0),
        "output_positive": (outputs > 0).float().mean(0),
        "output_variance": outputs.var(0, correction=0),
    }.items():
        torch.testing.assert_close(stats["plain.weight"][kind].flatten(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_precision_is_summed_in_float32(dtype):
    layer, x = nn.Linear(4, 4).to(dtype), torch.full((5000, 4), 0.01, dtype=dtype)
    stats, _ = collect(layer, ["input_norm"], x)
    expected = (5000 * x[0, 0].double() ** 2).sqrt()
    np.testing.assert_allclose(stats["weight"]["input_norm"].numpy(), float(expected), rtol=1e-4)


def test_no_hook_is_set_without_need_or_left_behind():
    net = nn.Sequential(nn.Linear(3, 3))
    with Statistics(net, select_targets(net), ["weight", "name", "grad"]).watch():
        assert not net[0]._forward_hooks
    statistics = Statistics(net, select_targets(net), ["input_norm"])
    with statistics.watch():
        assert len(net[0]._forward_hooks) == 1
    with pytest.raises(RuntimeError, match="shapes"), statistics.watch():
        net(torch.ones(1, 7))
    assert not net[0]._forward_hooks


def test_gradients_count_only_when_the_step_was_taken():
    layer = nn.Linear(2, 2)
    statistics = Statistics(layer, select_targets(layer), ["grad"])
    layer.weight.grad = torch.full((2, 2), float("inf"))
    statistics.note_gradients()  # mixed precision skips this step
    assert not statistics.is_complete
    layer.weight.grad = torch.ones(2, 2)
    statistics.note_gradients()
    statistics.confirm()
    assert statistics.is_complete and torch.equal(statistics.read()["weight"]["grad"], torch.ones(2, 2))
    layer.weight.grad.zero_()
    assert torch.equal(statistics.read()["weight"]["grad"], torch.ones(2, 2)), "the gradient is a copy"
    statistics.clear()
    with pytest.raises(ValueError, match="`weight` has no `grad`: no gradient reached it"):
        statistics.read()


def test_movement_is_the_sum_over_steps_and_survives_clear_and_reload():
    layer = nn.Linear(3, 2)
    statistics = Statistics(layer, select_targets(layer), ["movement"])
    total = torch.zeros(2, 3)
    for _ in range(3):
        layer.weight.grad = torch.randn(2, 3)
        total -= layer.weight.detach() * layer.weight.grad
        statistics.note_gradients()
        statistics.confirm()
        statistics.clear()
    torch.testing.assert_close(statistics.read()["weight"]["movement"], total)
    other = Statistics(layer, select_targets(layer), ["movement"])
    other.load_state_dict(statistics.state_dict())
    assert other.is_complete and torch.equal(
        other.read()["weight"]["movement"], statistics.read()["weight"]["movement"]
    )


def test_squared_gradients_are_a_mean_over_the_steps_since_the_last_update():
    layer = nn.Linear(3, 2)
    statistics = Statistics(layer, select_targets(layer), ["grad_square"])
    seen = []
    for step in range(5):
        layer.weight.grad = torch.randn(2, 3)
        statistics.note_gradients()
        if step == 2:
            statistics.confirm(), statistics.clear()  # an update
            continue
        if step != 1:  # a step that mixed precision skips
            statistics.confirm()
            seen.append(layer.weight.grad.numpy() ** 2)
    found = statistics.read()["weight"]["grad_square"]
    np.testing.assert_allclose(found, np.mean(seen[1:], axis=0), rtol=1e-6)
    other = Statistics(layer, select_targets(layer), ["grad_square"])
    other.load_state_dict(statistics.state_dict())
    layer.weight.grad = torch.randn(2, 3)
    for one in (statistics, other):
        one.note_gradients()
        one.confirm()
    assert torch.equal(*(one.read()["weight"]["grad_square"] for one in (statistics, other)))


def test_a_state_of_another_form_is_refused_and_one_of_another_criterion_left_alone():
    layer = nn.Linear(3, 2)
    statistics = Statistics(layer, select_targets(layer), ["movement"])
    with pytest.raises(ValueError, match=r"are totals and counts, but got 'weight': another version"):
        statistics.load_state_dict({"weight": torch.ones(2, 3)})
    statistics.load_state_dict({"grad.total.weight": torch.ones(2, 3), "grad.count.weight": torch.tensor(1)})
    assert not statistics.is_complete


def test_low_precision_gradients_are_summed_in_float32():
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    kinds = ["grad", "grad_mean", "grad_square", "movement"]
    statistics = Statistics(layer, select_targets(layer), kinds)
    for _ in range(1000):
        layer.weight.grad = torch.full_like(layer.weight, 0.125)
        statistics.note_gradients()
        statistics.confirm()
    found = {name: float(value) for name, value in statistics.read()["weight"].items()}
    expected = {"grad": 0.125, "grad_mean": 0.125, "grad_square": 0.125**2}
    expected["movement"] = -125 * float(layer.weight.detach())
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Statistics(n := nn.Linear(2, 2), select_targets(n), ["weigth"]),
            r"got 'weigth'. Did you mean weight\?",
        ),
        (
            lambda: Statistics(n := nn.LSTM(2, 2), select_targets(n, include=["*"]), ["input_norm"]),
            "belongs to LSTM: exclude it",
        ),
        (
            lambda: collect(nn.MultiheadAttention(4, 2), ["output_mean"], torch.ones(1, 1, 4)),
            "`in_proj_weight` belongs to MultiheadAttention",
        ),
        (
            lambda: collect(nn.MultiheadAttention(4, 2), ["input_norm"], *[torch.ones(1, 1, 4)] * 3),
            "`out_proj.weight` has no `input_norm`: nothing flowed through NonDynamicallyQuantizableLinear",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
