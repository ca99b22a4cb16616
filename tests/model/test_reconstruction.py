"""What stays makes up for the channels that go: the best values, as numpy finds them; and a failure changes nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channel, Head, Layer, LeastSquares, SparseGPT, shrink
from lightning_prune.examples.networks import GPT, ConvNet
from lightning_prune.model.calibration import reestimate_batch_norm_


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def test_weights_and_bias_are_those_of_least_squares() -> None:
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(200, 6)
    dense = copy.deepcopy(model)
    plan = shrink(
        model, x[:2], 0.5, granularity=Channel(multiple_of=1), batches=[x], solver=LeastSquares(1e-9)
    )
    with torch.no_grad():
        hidden = dense[1](dense[0](x))
        first, second = (list(plan.slices[name][0]) for name in ("0.weight", "2.weight"))

        def best(inputs: Tensor, kept: list[int], layer: nn.Linear) -> Tensor:
            with_one = torch.cat([inputs[:, kept], torch.ones(len(x), 1)], 1).double().numpy()
            return torch.tensor(
                np.linalg.lstsq(with_one, layer(inputs).double().numpy(), rcond=None)[0]
            ).float()

        solved = best(hidden, first, dense[2])  # (inputs and one, outputs)
        torch.testing.assert_close(model[2].weight, solved[:-1, second].t(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model[2].bias, solved[-1, second], rtol=1e-3, atol=1e-4)
        after = torch.cat([hidden[:, first], torch.ones(len(x), 1)], 1) @ solved  # of all rows, kept or not
        solved = best(after.relu(), second, dense[4])
        torch.testing.assert_close(model[4].weight, solved[:-1].t(), rtol=1e-3, atol=1e-4)
        assert torch.equal(model[0].weight, dense[0].weight[first])
    assert plan.error is not None and plan.error < 1e-10


class Embedded(nn.Module):
    """A GPT that takes vectors, so that one test fits all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = GPT(11, num_layers=2, num_heads=4, width=32)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.flatten(1) * 5).long().clamp(0, 10))  # type: ignore[no-any-return]


NETWORKS = {
    "convolutions and batch norms": (ConvNet, (1, 8, 8), Channel()),
    "attention and MLPs": (Embedded, (12,), Channel()),
    "whole heads": (Embedded, (12,), Head()),
}


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_the_smaller_model_is_nearer_to_the_dense_one(kind: str) -> None:
    make, shape, granularity = NETWORKS[kind]
    torch.manual_seed(0)
    dense = make().eval()
    batches = [torch.rand(32, *shape) for _ in range(6)]
    test = torch.rand(64, *shape)
    reestimate_batch_norm_(dense, batches)
    errors = {}
    for solver in (None, LeastSquares()):
        model = copy.deepcopy(dense)
        plan = shrink(model, batches[0][:2], 0.4, granularity=granularity, batches=batches, solver=solver)
        assert plan.error is not None and plan.error < 1e-10
        with torch.no_grad():
            errors[solver] = float((model.eval()(test) - dense(test)).norm())
    assert errors[LeastSquares()] < 0.8 * errors[None], errors


def test_batches_without_examples_say_nothing() -> None:
    torch.manual_seed(0)
    dense, batch = ConvNet().eval(), torch.rand(32, 1, 8, 8)
    found = []
    for batches in ([batch], [batch[:0], batch, batch[:0]]):
        model = copy.deepcopy(dense)
        shrink(model, batch[:2], 0.5, batches=batches, solver=LeastSquares())
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_failure_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = mlp()
    before = copy.deepcopy(model.state_dict())

    class Broken(LeastSquares):
        def __call__(self, *, weight: Tensor, gram: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            if len(weight) == 3:
                raise RuntimeError("the last layer")
            return super().__call__(weight=weight, gram=gram, mask=mask)

    with pytest.raises(RuntimeError, match="the last layer"):
        shrink(model, torch.randn(2, 6), 0.5, batches=[torch.randn(20, 6)], solver=Broken())
    with pytest.raises(ValueError, match="`2.weight` has inputs that are infinite or NaN"):
        shrink(model, torch.randn(2, 6), 0.5, batches=[torch.full((4, 6), torch.inf)], solver=LeastSquares())
    with pytest.raises(ValueError, match="`batches` is calibration data, which a solver needs, but got none"):
        shrink(model, torch.randn(2, 6), 0.5, solver=LeastSquares())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("granularity", [Channel(), Head(), Layer()])
def test_solvers_that_choose_weights_are_refused(granularity: Channel | Head | Layer) -> None:
    solver = LeastSquares() if isinstance(granularity, Layer) else SparseGPT()
    with pytest.raises(ValueError, match=r"gives the best values to what stays, LeastSquares\(\), but got "):
        shrink(mlp(), torch.randn(2, 6), 0.5, granularity=granularity, solver=solver)
