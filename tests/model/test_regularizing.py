"""Penalties on coupled groups against autograd of the penalty written out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import BatchNormScale, Channel, GroupDecay, GroupLasso, TrainTimePruning, Weight, Window
from lightning_prune.core.recipe import Recipe
from lightning_prune.model.calls import Call
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.regularizing import regularize_, scales_of
from tests.callbacks.toy import Toy, data, trainer
from tests.members import members


class Net(nn.Module):
    """Two coupled groups: the hidden channels, and those that the two halves of a concatenation bring together."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 1, bias=False)
        self.head = nn.Linear(10, 2)
        nn.init.uniform_(self.norm.weight, -1, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        return self.head(torch.cat([x, self.second(x)], 1).mean((2, 3)))


def pieces(net):
    """What goes with each index of each group, read off the network by hand."""
    hidden = [
        [
            net.first.weight[k],
            net.first.bias[k : k + 1],
            net.norm.weight[k : k + 1],
            net.norm.bias[k : k + 1],
            net.second.weight[:, k],
            net.head.weight[:, k],
        ]
        for k in range(6)
    ]
    return {"first": hidden, "second": [[net.second.weight[k], net.head.weight[:, 6 + k]] for k in range(4)]}


def norms(groups):
    return [torch.cat([p.flatten() for p in index]).norm() for index in groups]


def lasso(net, strength):
    total = 0.0
    for group in pieces(net).values():
        for index in group:
            total = total + sum(p.numel() for p in index) ** 0.5 * norms([index])[0]
    return strength * total


def decay(net, strength, steepness):
    total = 0.0
    for group in pieces(net).values():
        found = torch.stack(norms(group))
        held = found.detach()
        weight = 2.0 ** (steepness * (held.max() - held) / (held.max() - held.min()))
        total = total + strength / 2 * (weight * found.square()).sum()
    return total


def scales(net, strength):
    return strength * net.norm.weight.abs().sum()


@pytest.mark.parametrize(
    ("regularizer", "penalty"),
    [
        (GroupLasso(0.3), lambda net: lasso(net, 0.3)),
        (GroupDecay(0.3, steepness=2.0), lambda net: decay(net, 0.3, 2.0)),
        (GroupLasso(0.3, over="scales"), lambda net: scales(net, 0.3)),
    ],
    ids=["lasso", "decay", "scales"],
)
def test_the_gradient_is_that_of_the_penalty(regularizer, penalty):
    net, x = Net(), torch.randn(2, 3, 5, 5)
    expected = torch.autograd.grad(penalty(net), list(net.parameters()), allow_unused=True)
    pruner = GroupPruner(net, Recipe(0.5, granularity=Channel(multiple_of=1)), Call(net, (x,), {}))
    loss = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), loss, strict=True):
        parameter.grad = gradient.clone()
    regularize_(regularizer, pruner.contest.groups, pruner.targets, scales_of(net))
    for (name, parameter), before, added in zip(net.named_parameters(), loss, expected, strict=True):
        goal = before if added is None else before + added
        torch.testing.assert_close(parameter.grad, goal, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("regularizer", members("regularizer"), ids=str)
def test_a_regularizer_pulls_towards_zero_and_leaves_alone_what_is_there(regularizer):
    norm, count = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([3.0, 3.0, 3.0])
    found = regularizer(norm=norm, count=count)
    assert found.shape == (3,) and bool((found >= 0).all()) and bool((found * norm >= 0).all())
    assert found.isfinite().all() and found[1] > found[2]  # the weak are pulled more
    assert regularizer(norm=torch.zeros(3), count=count).isfinite().all()


def test_in_training_channels_that_go_are_smaller_than_without():
    def spread(regularizer):
        callback = TrainTimePruning(
            0.5,
            granularity=Channel(multiple_of=1),
            window=Window(0.9, 1.0),
            regularizer=regularizer,
            report=False,
            shrink="never",
        )
        seen = []

        class Watch(Toy):
            def on_train_batch_end(self, *_):
                if not callback.masks:
                    seen.append(self.body[0].weight.detach().norm(dim=1).clone())

        watched = Watch("SGD", lr=0.05)
        trainer(callback).fit(watched, data(), data())
        return float(seen[-1].min() / seen[-1].max()), callback

    with_it, callback = spread(GroupDecay(0.2))
    without, _ = spread(None)
    assert with_it < 0.8 * without
    assert callback.describe()["regularizer"] == str(GroupDecay(0.2))


def test_the_penalty_ends_with_the_window():
    callback = TrainTimePruning(
        0.5,
        granularity=Channel(multiple_of=1),
        criterion=BatchNormScale(),
        include=["body.0"],
        window=Window(0.0, 0.5, 0.1),
        regularizer=GroupLasso(10.0, over="scales"),
        report=False,
    )
    seen = []

    class Watch(Toy):
        def on_before_optimizer_step(self, optimizer):
            seen.append(float(self.body[1].weight.grad.abs().max()))

    trainer(callback).fit(Watch("SGD", lr=1e-4), data(), data())
    assert min(seen[:11]) > 9.0 > max(seen[13:])


def test_it_is_for_coupled_groups():
    with pytest.raises(ValueError, match="`regularizer` is for granularities of coupled groups"):
        TrainTimePruning(0.5, granularity=Weight(), regularizer=GroupLasso())
    for make in (lambda: GroupLasso(0.0), lambda: GroupDecay(steepness=0.0), lambda: GroupLasso(over="bias")):
        with pytest.raises(ValueError, match="`(strength|steepness|over)`"):
            make()
