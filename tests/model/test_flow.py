"""SynFlow against the published algorithm, written out in numpy: products of absolute matrices."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import SynFlow, prune
from lightning_prune.model.calibration import evaluating
from lightning_prune.model.flow import flow_gradients


def network(*widths, bias=False):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(widths)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


def synflow(weights):
    """Tanaka et al. 2020: score_l = (1^T |W_L| ... |W_l+1|)^T (|W_l-1| ... |W_1| 1)^T * |W_l|."""
    scores = []
    for i, w in enumerate(weights):
        before, after = np.ones(weights[0].shape[1]), np.ones(weights[-1].shape[0])
        for v in weights[:i]:
            before = np.abs(v) @ before
        for v in reversed(weights[i + 1 :]):
            after = after @ np.abs(v)
        scores.append(np.abs(w) * np.outer(after, before))
    return scores


def scores_of(model, batch):
    targets = {n: p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1}
    found = flow_gradients(model, targets, lambda: model(batch))
    return [SynFlow()(weight=p.detach(), flow_gradient=found[n]).numpy() for n, p in targets.items()]


def test_scores_are_those_of_the_paper_up_to_a_factor():
    model = network(5, 7, 4, 3)
    found = scores_of(model, torch.randn(8, 5))
    expected = synflow([m.weight.detach().double().numpy() for m in model if isinstance(m, nn.Linear)])
    factor = expected[0].sum() / found[0].sum()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours * factor, theirs, rtol=1e-12)


def test_the_scores_of_each_layer_and_of_each_hidden_unit_are_conserved():
    """Theorem 1 and 2: what flows into a unit flows out of it."""
    found = scores_of(network(5, 7, 4, 3), torch.randn(8, 5))
    for one, other in pairwise(found):
        np.testing.assert_allclose(one.sum(1), other.sum(0), rtol=1e-12)


def test_a_network_with_batch_norms_at_initialisation_is_scored_as_by_the_authors_code():
    """All of the state is made positive, the input is ones, and the score is |w dR/dw|, in eval mode and float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    found = scores_of(model.eval(), torch.randn(5, 2, 8, 8))
    theirs = copy.deepcopy(model).double()
    for tensor in theirs.state_dict().values():
        tensor.abs_()
    theirs(torch.ones(1, 2, 8, 8, dtype=torch.float64)).sum().backward()
    expected = [(p.grad * p).detach().abs().numpy() for p in theirs.parameters() if p.dim() > 1]
    factor = expected[0].sum() / found[0].sum()
    for ours, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours * factor, other, rtol=1e-9)


def test_no_data_is_read_and_nothing_is_left_behind():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2)
    )
    model[1].running_mean.uniform_(-1, 1), model[1].running_var.uniform_(1, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    with evaluating(model.train()):
        first, second = scores_of(model, torch.ones(8, 2, 4, 4)), scores_of(model, torch.zeros(3, 2, 4, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.get_default_dtype() == torch.float32 and model[0].weight.dtype == torch.float32
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model[3].training
    assert torch.equal(torch.get_rng_state(), random)


def test_norms_scale_and_do_not_couple_the_paths():
    """A layer norm of ones would be zero; here it passes its scale on, and a batch norm divides by what it has seen."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    found = scores_of(model, torch.randn(1, 3))
    weights = [model[i].weight.detach().double().numpy() for i in (0, 2)]
    weights[0] = weights[0] * np.array([1.0, 2.0, 0.5, 3.0])[:, None]
    expected = synflow(weights)
    factor = expected[1].sum() / found[1].sum()
    np.testing.assert_allclose(found[1] * factor, expected[1], rtol=1e-6)
    assert "forward" not in vars(model[1])
    plain = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        plain[1].running_mean.fill_(9.0), plain[1].running_var.fill_(4.0)
    without = nn.Sequential(plain[0], plain[2])
    for ours, theirs in zip(
        scores_of(plain, torch.randn(1, 3)), scores_of(without, torch.randn(1, 3)), strict=True
    ):
        np.testing.assert_allclose(ours / ours.sum(), theirs / theirs.sum(), rtol=1e-9)


class Tied(nn.Module):
    """Tokens in, logits out of the same matrix, called by a keyword, with a dict as output."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, *, tokens):
        x = F.relu(self.hidden(self.embedding(tokens)))
        logits = x @ self.embedding.weight.T
        return {"loss": -99 * logits.mean(), "logits": logits, "length": tokens.shape[1]}


def test_tokens_tied_weights_and_dicts():
    model, tokens = Tied(), torch.tensor([[0, 1, 2]])
    found = flow_gradients(model, dict(model.named_parameters()), lambda: model(tokens=tokens))
    assert set(found) == {"embedding.weight", "hidden.weight", "hidden.bias"}
    into = model.hidden.weight.detach().abs().sum(1) + model.hidden.bias.detach().abs()
    row = found["embedding.weight"][0] / found["embedding.weight"][0].sum()
    torch.testing.assert_close(row, (into / into.sum()).double())


def test_what_float64_cannot_hold_is_refused():
    layers = [nn.Linear(2, 2) for _ in range(4)]
    for layer in layers:
        nn.init.constant_(layer.weight, 3e38)
    deep = nn.Sequential(*layers, *layers, *layers)
    with pytest.raises(ValueError, match="exceed what float64 can hold"):
        flow_gradients(deep, dict(deep.named_parameters()), lambda: deep(torch.ones(1, 2)))


def test_a_run_without_a_module_is_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="called no module that has parameters"):
        flow_gradients(layer, {"weight": layer.weight}, lambda: None)


def test_prune_takes_a_single_batch_and_no_loss():
    model = network(6, 8, 2)
    scores = synflow([model[i].weight.detach().double().numpy() for i in (0, 2)])
    kept = np.sort(np.concatenate([s.flatten() for s in scores]))[32:].min()
    masks = prune(model, 0.5, criterion=SynFlow(), batches=[torch.randn(2, 6)])
    for mask, expected in zip(masks.values(), scores, strict=True):
        np.testing.assert_array_equal(mask.numpy(), expected >= kept)


@pytest.mark.parametrize("names", [["0.weight"], ["3.weight"], []])
def test_what_no_flow_reaches_is_left_out(names):
    """An embedding gives ones whatever its weights are, and what does not run gives nothing."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    parameters = {name: model.get_parameter(name) for name in names}
    assert flow_gradients(model, parameters, lambda: model[:3](torch.tensor([[0, 1]]))) == {}
