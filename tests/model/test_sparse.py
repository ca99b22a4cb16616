"""Sparse linear layers: the same numbers as dense ones, the same checkpoints, and no training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import SparseLinear, densify, prune

SHAPES = [(40,), (1, 40), (7, 40), (2, 3, 40), (2, 1, 3, 40), (0, 40)]


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    dense = nn.Linear(40, 24, bias).eval()
    prune(nn.ModuleList([dense]), 0.9)
    return dense.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_are_those_of_the_dense_layer(shape, bias, dtype):
    dense = layer(bias, dtype)
    x = torch.randn(shape, dtype=dtype)
    found = SparseLinear(dense)(x)
    assert found.is_contiguous() and found.dtype == dtype
    torch.testing.assert_close(found, dense(x))


def test_strided_inputs_and_gradients_of_inputs():
    dense, x = layer(), torch.randn(3, 40, 5, requires_grad=True)
    for module in (dense, SparseLinear(dense)):
        module(x.transpose(1, 2)).square().sum().backward()
    ours = x.grad.clone()
    x.grad = None
    for _ in range(2):
        dense(x.transpose(1, 2)).square().sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_the_weight_is_what_other_code_reads():
    dense, x = layer(), torch.randn(5, 40)
    sparse = SparseLinear(dense)
    assert sparse.weight.dtype == torch.float32 and sparse.weight.shape == (24, 40)
    torch.testing.assert_close(F.linear(x, sparse.weight, sparse.bias), dense(x))
    assert sparse.rows.dtype == sparse.columns.dtype == torch.int32
    assert "sparsity=0.9000" in repr(sparse)


def test_checkpoints_are_those_of_the_dense_layer():
    dense, sparse = layer(), SparseLinear(layer())
    state = sparse.state_dict()
    assert list(state) == list(dense.state_dict())
    assert all(torch.equal(state[n], t) for n, t in dense.state_dict().items())
    nn.Linear(40, 24).load_state_dict(state)
    other = nn.Sequential(SparseLinear(nn.Linear(40, 24)).eval())
    other.load_state_dict({f"0.{n}": t for n, t in state.items()})
    assert torch.equal(other[0].weight.to_dense(), dense.weight)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for 0.weight: \(2, 2\) in the checkpoint, \(24, 40\)"
    ):
        other.load_state_dict({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(24)})
    with pytest.raises(RuntimeError, match=r"Missing key.*0.weight"):
        other.load_state_dict({"0.bias": torch.ones(24)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0.extra"):
        other.load_state_dict(
            {"0.weight": torch.ones(24, 40), "0.bias": torch.ones(24), "0.extra": torch.ones(1)}
        )


def test_copies_and_casts_compute_the_same():
    sparse, x = SparseLinear(layer()), torch.randn(5, 40)
    torch.testing.assert_close(copy.deepcopy(sparse)(x), sparse(x))
    assert copy.deepcopy(sparse).double()(x.double()).dtype == torch.float64
    assert not list(sparse.parameters())


def test_training_is_refused():
    sparse = SparseLinear(layer()).train()
    with pytest.raises(
        ValueError, match=r"`training` is False for layers with sparse kernels.*densify\(model\)"
    ):
        sparse(torch.randn(5, 40))


def test_densify_undoes_it_in_each_place():
    dense = layer()
    sparse = SparseLinear(dense)
    net = nn.ModuleDict({"a": sparse, "b": nn.Sequential(nn.ReLU(), sparse)})
    assert densify(net) == ("a",)
    assert net["a"] is net["b"][1] and type(net["a"]) is nn.Linear
    assert torch.equal(net["a"].weight, dense.weight) and net["a"].weight.requires_grad
    assert densify(net) == ()
