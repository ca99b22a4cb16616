import pytest
import torch
from torch import nn

from lightning_prune.model.optimizer import mask_state_, parameter_ids

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
    lambda p: torch.optim.Adagrad(p, 0.1),
]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_state_of_pruned_weights_is_zero_and_of_the_others_untouched(build):
    layer = nn.Linear(6, 4)
    optimizer = build(layer.parameters())
    layer(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[layer.weight].items() if torch.is_tensor(v)}
    mask = torch.rand(4, 6) > 0.5
    mask_state_([optimizer], {"weight": layer.weight}, {"weight": mask})
    touched = 0
    for key, value in optimizer.state[layer.weight].items():
        if torch.is_tensor(value) and value.shape == mask.shape:
            assert torch.equal(value, before[key] * mask)
            touched += 1
        elif torch.is_tensor(value):
            assert torch.equal(value, before[key])
    assert touched
    assert all(v.abs().sum() > 0 for v in optimizer.state[layer.bias].values() if torch.is_tensor(v))


def test_the_flat_history_of_lbfgs_starts_anew():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        value = layer(torch.ones(1, 3)).square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.state
    mask_state_([optimizer], {"weight": layer.weight}, {"weight": torch.ones(2, 3, dtype=torch.bool)})
    assert not optimizer.state
    optimizer.step(closure)


def test_parameter_ids_are_over_all_groups():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": first.parameters()}, {"params": [second.weight], "lr": 1.0}], 0.1)
    assert parameter_ids([optimizer]) == {id(first.weight), id(first.bias), id(second.weight)}
