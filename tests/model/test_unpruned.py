"""What is left out without anyone having asked for that is told, with how much of the model it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.core.recipe import Recipe
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.unpruned import layers_left_out


class Parts(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def told(model, **options):
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    recipe = Recipe(0.5, **options)
    return list(layers_left_out(model, recipe, Pruner(model, recipe, trained=trained).targets))


def forecaster():
    return Parts(rnn=nn.LSTM(16, 32), head=nn.Linear(32, 4))


@pytest.mark.parametrize(
    ("model", "share", "named"),
    [
        (forecaster(), "2%", "`rnn` (98%: LSTM is pruned only where `include` names it)"),
        (
            Parts(cell=nn.GRUCell(8, 24), head=nn.Linear(24, 96)),
            "50%",
            "`cell` (50%: GRUCell is pruned only where `include` names it)",
        ),
        (
            Parts(w=nn.Parameter(torch.ones(6, 8, 8)), head=nn.Linear(8, 16)),
            "25%",
            "`w` (75%: Parts is pruned only where `include` names it)",
        ),
        (
            Parts(
                net=nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16)).requires_grad_(False),
                head=nn.Linear(8, 16),
            ),
            "25%",
            "`net` (75%: it is frozen)",
        ),
        (
            Parts(emb=nn.Embedding(90, 8), head=nn.Linear(8, 10)),
            "10%",
            "`emb` (90%: Embedding is pruned only where `include` names it)",
        ),
    ],
    ids=["recurrent", "cell", "plain parameter", "frozen", "embedding"],
)
def test_much_that_is_left_out_is_named_with_its_share_and_why(model, share, named):
    (text,) = told(model)
    assert text == (f"{share} of the weights are pruned, and sparsities are of those. Left out are {named}.")


def test_what_is_asked_for_or_small_is_not_told_of():
    assert told(forecaster(), include=["rnn"]) == [] == told(forecaster(), exclude=["rnn"])
    positions = nn.Parameter(torch.ones(1, 4, 8))
    assert told(Parts(positions=positions, a=nn.Linear(8, 64), head=nn.Linear(64, 8))) == []
    frozen = nn.Linear(8, 16).requires_grad_(False)  # a teacher, say
    assert told(Parts(net=frozen, head=nn.Linear(8, 16))) == []
    assert told(Parts(emb=nn.Embedding(40, 8), a=nn.Linear(8, 50), head=nn.Linear(50, 8))) == []


def test_a_computed_layer_is_told_of_once():
    net = Parts(a=nn.utils.parametrizations.weight_norm(nn.Linear(8, 64)), head=nn.Linear(64, 8))
    (text,) = told(net)
    assert text.startswith("`a` is not pruned: its weight is computed from others")
