"""The functional form: on plain modules, against torch's own pruning and against what one would do by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from lightning_prune import (
    APoZ,
    Block,
    Global,
    Local,
    Magnitude,
    Movement,
    NofM,
    PerRow,
    Saliency,
    Slice,
    Wanda,
    prune,
)
from lightning_prune.core.masks import sparsity_of
from lightning_prune.core.recipe import Recipe
from lightning_prune.model.calibration import reestimate_batch_norm_
from lightning_prune.model.pruning import Pruner


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def batches(num=3):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 2, 6, 6, generator=draw), torch.randint(0, 4, (5,), generator=draw))
        for _ in range(num)
    ]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def weights(model):
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def test_global_magnitude_is_what_torch_prunes():
    ours, theirs = network(), network()
    masks = prune(ours, 0.7)
    targets = [(m, "weight") for m in theirs if isinstance(m, (nn.Conv2d, nn.Linear))]
    torch_prune.global_unstructured(targets, torch_prune.L1Unstructured, amount=0.7)
    for (name, weight), (module, _) in zip(weights(ours).items(), targets, strict=True):
        assert torch.equal(weight, module.weight), name
        assert torch.equal(masks[name], module.weight_mask.bool()), name


def test_local_filters_are_what_torch_prunes():
    ours, theirs = network(), network()
    prune(ours, 0.5, granularity=Slice(dim=0), scope=Local(), criterion=Magnitude(p=2))
    for ours_layer, layer in zip(ours, theirs, strict=True):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            torch_prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
            assert torch.equal(ours_layer.weight, layer.weight)


def test_wanda_by_hand():
    model, data = network(), batches()
    reference = copy.deepcopy(model).eval()
    prune(model, 0.5, criterion=Wanda(), scope=PerRow(), batches=data)
    inputs = []
    reference[7].register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    for x, _ in data:
        reference(x)
    scores = reference[7].weight.detach().abs() * torch.cat(inputs).norm(dim=0)
    expected = torch.zeros_like(scores).scatter(1, scores.argsort(1, descending=True)[:, :8], 1.0)
    assert torch.equal(model[7].weight != 0, expected.bool())


def test_saliency_by_hand():
    model, data = network(), batches()
    reference = copy.deepcopy(model).eval()
    masks = prune(model, 0.5, criterion=Saliency(), batches=data, loss=loss, include=["7"])
    sum(loss(reference, batch) for batch in data).backward()
    scores = (reference[7].weight * reference[7].weight.grad).abs().flatten()
    expected = torch.zeros(64, dtype=torch.bool)
    expected[scores.argsort(descending=True)[:32]] = True
    assert torch.equal(masks["7.weight"].flatten(), expected)


def test_nothing_to_exclude_is_said_by_none_as_well():
    assert Recipe(0.5, exclude=None) == Recipe(0.5, exclude=())


def test_pruning_leaves_all_else_as_it_was():
    model = network().train()
    model[5].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    keep = model[7].weight.grad = torch.ones_like(model[7].weight)
    torch.manual_seed(3)
    masks = prune(model, 0.5, criterion=Saliency(), batches=batches(), loss=loss)
    after = model.state_dict()
    assert list(after) == list(before) and [m.training for m in model.modules()] == modes
    for name in before:
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(after[name], expected), name
    assert model[7].weight.grad is keep and model[0].weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity` is a sparsity, the fraction removed, in \[0, 1\), but got 1.0"),
        ({"sparsity": None}, r"`sparsity` is the fraction removed .* got None"),
        ({"sparsity": 0.5, "scope": NofM()}, r"`sparsity` is prescribed by NofM"),
        ({"sparsity": {"0": 0.5}, "scope": Local()}, r"`sparsity` by pattern sets the scope"),
        ({"sparsity": 0.5, "exclude": "head"}, r"`exclude` is a list of patterns, but got the text 'head'"),
        ({"sparsity": 0.5, "exclude": ["hade"]}, r"pattern that matches no weight: 'hade'"),
        ({"sparsity": 0.5, "criterion": Wanda()}, r"`batches` is calibration data"),
        ({"sparsity": 0.5, "criterion": Wanda(), "batches": []}, r"at least one batch, but got none"),
        ({"sparsity": 0.5, "criterion": Saliency(), "batches": [1]}, r"`loss` is a function"),
        ({"sparsity": 0.5, "criterion": Movement(), "batches": [1]}, r"`movement`, a sum over training"),
        ({"scope": NofM()}, r"`0.weight`: 2:4 needs an input dim"),
        ({"sparsity": 0.5, "criterion": lambda *, weihgt: weihgt}, r"'weihgt'. Did you mean weight"),
    ],
)
def test_mistakes_are_refused_and_the_model_is_as_it_was(arguments, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nan_weights_are_refused_by_name_and_nothing_is_changed():
    model = network()
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"`5.weight` has scores that can be ranked, but got 1 NaN in shape \(16, 32\)"
    ):
        prune(model, 0.5)
    assert torch.equal(before["0.weight"], model[0].weight)


def test_numbers_by_pattern():
    model = network()
    masks = prune(model, {"7": 0.25, "re:[05].*": 0.5})
    assert {name: sparsity_of({name: mask}) for name, mask in masks.items()} == {
        "0.weight": 0.5,
        "3.weight": 0.0,
        "5.weight": 0.5,
        "7.weight": 0.25,
    }


def test_what_is_pruned_stays_pruned_while_sparsity_rises_and_returns_when_it_falls():
    model = network()
    pruner = Pruner(model, Recipe(0.8))
    pruner.update_(0.5)
    first = dict(pruner.masks)
    with torch.no_grad():
        for name, p in pruner.targets.items():
            p.copy_(
                torch.where(first[name], 0.01 * p, 10.0)
            )  # the pruned have grown, as without a mask they might
    pruner.update_(1.0)
    assert all(bool((pruner.masks[name] <= first[name]).all()) for name in first)
    pruner.update_(0.0)
    assert pruner.masks == {} and pruner.requested == 0.0


def test_sharing_a_weight_prunes_it_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    masks = prune(model, 0.5)
    assert (
        list(masks) == ["0.weight"]
        and model[1].weight is model[0].weight
        and int((model[1].weight == 0).sum()) == 18
    )


def test_two_models_do_not_share_masks():
    """APEX ASP keeps process-global mask state."""
    first, second = network(), network()
    prune(first, 0.9)
    prune(second, 0.1)
    assert sparsity_of({n: p != 0 for n, p in weights(first).items()}) == pytest.approx(0.9, abs=1e-3)
    assert sparsity_of({n: p != 0 for n, p in weights(second).items()}) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("granularity", [Slice(dim=1), Block(height=2, width=2)], ids=str)
def test_group_counts(granularity):
    pruner = Pruner(network(), Recipe(0.5, granularity=granularity, scope=Global()))
    assert pruner.count_groups("7.weight")[0] == pruner.count_groups("7.weight")[1]
    pruner.update_(1.0)
    kept = sum(pruner.count_groups(name)[1] for name in pruner.targets)
    assert kept == pruner.num_groups - round(0.5 * pruner.num_groups)
    assert Pruner(network(), Recipe(0.5)).count_groups("7.weight") is None


def test_state_round_trip_and_refusals():
    pruner, other = (Pruner(network(), Recipe(0.8)) for _ in range(2))
    pruner.update_(0.7)
    state = pruner.state_dict()
    other.load_state_dict(state)
    assert (
        all(torch.equal(other.masks[n], pruner.masks[n]) for n in pruner.masks)
        and other.requested == pruner.requested
    )
    fewer = Pruner(network(), Recipe(0.8, exclude=["7"]))
    with pytest.raises(
        ValueError, match=r"but got some for 7.weight: the model, `include` or `exclude` has changed"
    ):
        fewer.load_state_dict(state)
    assert fewer.masks == {}
    state["masks"]["7.weight"]["shape"] = [16, 4]
    with pytest.raises(ValueError, match=r"`7.weight`: a mask .* shape \(4, 16\), but got .*\(16, 4\)"):
        other.load_state_dict(state)


def test_apoz_removes_the_dead_neurons():
    model = network()
    with torch.no_grad():
        model[5].bias[:4], model[5].bias[4:] = -100.0, 100.0
    masks = prune(model, 0.25, criterion=APoZ(), granularity=Slice(dim=0), include=["5"], batches=batches())
    assert masks["5.weight"].any(1).tolist() == [False] * 4 + [True] * 12


def test_batch_norm_is_estimated_anew_as_plain_averages():
    model, data = network(), batches()
    prune(model, 0.5)
    momentum, before = model[1].momentum, copy.deepcopy(model.state_dict())
    assert reestimate_batch_norm_(model, data) == 1
    outputs = [model[0](x).detach() for x, _ in data]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    var = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert model[1].momentum == momentum and model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if not k.startswith("1."))
    assert reestimate_batch_norm_(nn.Linear(2, 2), data) == 0
