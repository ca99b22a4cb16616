"""Parameters of all sorts: what can be masked is, what cannot is left alone or refused by name."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_prune import (
    Channel,
    InitialPruning,
    PostTrainingPruning,
    SparseTraining,
    SynFlow,
    TrainTimePruning,
    Wanda,
    prune,
    shrink,
)
from lightning_prune.model.apply import apply_masks_
from tests.callbacks.toy import Toy, data, pruned_weights, trainer


class Odd(nn.Module):
    """A linear layer and a parameter of some sort."""

    def __init__(self, value):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.p = nn.Parameter(value, requires_grad=value.is_floating_point() or value.is_complex())

    def forward(self, x):
        return self.layer(x)


NO_CANDIDATES = {
    "empty": torch.empty(0, 3),
    "zero dims": torch.tensor(3.0),
    "one dim": torch.ones(3),
    "integers": torch.ones(3, 3).int(),
    "booleans": torch.ones(3, 3).bool(),
    "complex": torch.randn(3, 3, dtype=torch.complex64),
    "8 bits": torch.ones(4, 4).to(torch.float8_e4m3fn),
    "sparse": torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("name", NO_CANDIDATES)
def test_what_is_no_matrix_of_numbers_is_left_alone(name):
    module = Odd(NO_CANDIDATES[name])
    assert list(prune(module, 0.5)) == ["layer.weight"]
    with pytest.raises(ValueError, match="`include` has a pattern that matches no weight: 'p'.*layer.weight"):
        prune(module, 0.5, include=["p"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.t(),
        lambda x: x.repeat(1, 2)[:, ::2],
        lambda x: x[:1, :1].clone(),
        lambda x: x.view(3, 2, 2, 1).to(memory_format=torch.channels_last),
    ],
    ids=["plain", "transposed", "strided", "single", "channels last"],
)
def test_half_of_any_matrix_is_zero_and_nothing_else_of_it_has_changed(dtype, make):
    module = Odd(make(torch.arange(1.0, 13.0).view(3, 4).to(dtype)))
    before, strides = module.p.detach().clone(), module.p.stride()
    is_too_small = before.numel() == 1
    with pytest.warns(UserWarning, match="Nothing was removed") if is_too_small else nullcontext():
        mask = prune(module, 0.5, include=["p"])["p"]
    assert int((~mask).sum()) == round(0.5 * before.numel())
    assert module.p.dtype == dtype and module.p.stride() == strides
    assert torch.equal(module.p, before * mask)
    assert before[mask].min() > before[~mask].max() if not mask.all() else True


def test_a_parameter_whose_entries_share_memory_is_refused_before_anything_is_changed():
    module = Odd(torch.randn(1, 4).expand(4, 4))
    before = module.layer.weight.clone()
    with pytest.raises(
        ValueError, match="`p` has entries that share memory, as `expand` makes them: clone it"
    ):
        prune(module, 0.5, include=["*"])
    assert torch.equal(module.layer.weight, before)


@pytest.mark.parametrize("other", [slice(2, 6), slice(0, 4)], ids=["overlapping", "the same"])
def test_two_parameters_that_share_memory_are_refused(other):
    memory = torch.randn(8, 4)
    module = Odd(memory[:4])
    module.q = nn.Parameter(memory[other])
    with pytest.raises(ValueError, match="`p` and `q` are two parameters that share memory"):
        prune(module, 0.5, include=["p", "q"])
    apart = Odd(memory[:4])
    apart.q = nn.Parameter(memory[4:])
    assert len(prune(apart, 0.5, include=["p", "q"])) == 2


def test_a_parameter_that_two_modules_hold_has_one_mask():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert list(prune(nn.Sequential(first, second), 0.5)) == ["0.weight"]


def test_weights_without_values_are_refused():
    model = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.Linear(8, 2, device="meta"))
    for function in (lambda: prune(model, 0.5), lambda: shrink(model, torch.randn(2, 4, device="meta"), 0.5)):
        with pytest.raises(ValueError, match="`0.weight` is on the meta device, without values"):
            function()


def test_lazy_weights_are_refused():
    with pytest.raises(ValueError, match="`weight` is a lazy parameter without a shape"):
        prune(nn.LazyLinear(3), 0.5)


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_quantised_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), torch.ao.nn.quantized.dynamic.Linear(4, 4), nn.Linear(4, 4))
    assert list(prune(model, 0.5)) == ["0.weight", "2.weight"]
    with pytest.raises(ValueError, match="candidates, parameters of at least two dims, are none"):
        prune(torch.ao.nn.quantized.dynamic.Linear(4, 4), 0.5)


class PartlyQuantized(Toy):
    """A frozen layer in 8 bits, whose tensors are of torchao's class and know few of torch's operations."""

    def __init__(self):
        super().__init__()
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(self.body, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "4")
        self.body[4].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainTimePruning(0.5),
        lambda: SparseTraining(0.5, report=False),
        lambda: PostTrainingPruning(0.5),
        lambda: PostTrainingPruning(0.5, criterion=Wanda(), report=False),
        lambda: InitialPruning(0.5, criterion=SynFlow(), num_rounds=2, report=False),
    ],
    ids=["train", "dst", "post", "wanda", "synflow"],
)
def test_layers_of_another_library_in_8_bits_are_left_alone_in_a_fit(make, tmp_path):
    module, callback = PartlyQuantized(), make()
    trainer(callback, default_root_dir=tmp_path, max_epochs=2).fit(module, data(), data())
    assert sorted(callback.masks) == ["body.0.weight", "head.weight"]
    assert callback.pruner.sparsity == pytest.approx(0.5, abs=0.01)
    if callback.report:
        report = json.loads(next(tmp_path.rglob("report.json")).read_text())
        dense = module.body[4].weight.dequantize()
        weights = [
            module.body[0].weight,
            module.head.weight,
            dense,
            *(p for p in module.parameters() if p.dim() == 1),
        ]
        assert report["cost_after"]["nonzeros"] == sum(int(w.count_nonzero()) for w in weights)
        assert report["cost_after"]["latency"] is not None


def test_frozen_weights_are_pruned_if_asked_for_and_not_otherwise():
    module = Toy()
    module.head.requires_grad_(False)
    callback = TrainTimePruning(0.5, report=False)
    trainer(callback).fit(module, data(), data())
    assert list(callback.masks) == ["body.0.weight", "body.4.weight"] and bool(module.head.weight.all())
    assert not any(bool(w.any()) for w in pruned_weights(module, callback))
    module = Toy()
    module.requires_grad_(False)
    module.body[1].requires_grad_(True)
    with pytest.raises(ValueError, match="leave nothing to prune in Toy"):
        trainer(TrainTimePruning(0.5, report=False)).fit(module, data(), data())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_structured_pruning_in_any_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)
    x = torch.randn(3, 8, dtype=dtype)
    plan = shrink(model, x, 0.5, granularity=Channel())
    assert model(x).shape == (3, 4) and model[0].weight.shape == (16, 8) and model[0].weight.dtype == dtype
    assert plan.error < 1e-12


def test_masks_of_another_shape_or_kind_are_refused():
    for mask in (torch.ones(3, 3), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="`masks` are boolean and of their tensors' shapes"):
            apply_masks_([torch.ones(3, 3)], [mask])
