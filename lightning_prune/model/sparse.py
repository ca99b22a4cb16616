"""Linear layers whose weight is kept as compressed sparse rows: on CPUs, faster than dense ones at high sparsity."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.types import Name


class SparseLinear(nn.Module):
    """A linear layer for evaluation, y = W x + b, that multiplies only the entries of W that are not zero.

    It computes `W_csr @ x^T` (`F.linear` with such a weight is far slower), with indices of 32 bits where they do.
    Its `state_dict` is that of the dense layer: a checkpoint of a converted model loads into a dense one, and the other
    way round.

    Args:
        dense: the layer to convert; it stays as it is.

    Raises:
        ValueError: `forward` was called in training mode.

    Example:
        >>> layer = SparseLinear(nn.Linear(3, 2)).eval()
        >>> layer(torch.ones(5, 7, 3)).shape, sorted(layer.state_dict())
        (torch.Size([5, 7, 2]), ['bias', 'weight'])
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        for name, part in zip(("rows", "columns", "values"), _compressed(dense.weight), strict=True):
            self.register_buffer(name, part, persistent=False)
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().clone())
        self.training = dense.training

    @property
    def weight(self) -> Tensor:
        """The weight, in compressed rows."""
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.rows, self.columns, self.values, shape, check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., out) of inputs (..., in)."""
        if self.training:
            raise ValueError(
                "`training` is False for layers with sparse kernels, which cannot learn, but got True: call "
                "`model.eval()`, or `densify(model)` to train on."
            )
        rows, weight, bias = x.reshape(-1, self.in_features), self.weight, self.bias
        if len(rows) == 1:  # a matrix of one column takes three times as long as a vector
            y = weight @ rows[0] if bias is None else torch.addmv(bias, weight, rows[0])
        else:
            y = weight @ rows.t() if bias is None else torch.addmm(bias.unsqueeze(1), weight, rows.t())
        return (y.t() if y.dim() == 2 else y).contiguous().view(*x.shape[:-1], self.out_features)

    def dense(self) -> nn.Linear:
        """Return the dense layer with the same weight."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.to_dense())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Return sizes and sparsity."""
        sparsity = 1.0 - self.values.numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={sparsity:.4f}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.to_dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take a dense weight, as a checkpoint has it."""
        name = prefix + "weight"
        if (weight := state_dict.get(name)) is None:
            missing_keys.append(name)
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            error_msgs.append(
                f"size mismatch for {name}: {tuple(weight.shape)} in the checkpoint, "
                f"{(self.out_features, self.in_features)} in the model."
            )
        else:
            self.rows, self.columns, self.values = _compressed(weight.to(self.values))
        found: list[str] = []
        super()._load_from_state_dict(
            dict(state_dict), prefix, local_metadata, strict, missing_keys, found, error_msgs
        )
        unexpected_keys += [key for key in found if key != name]


def densify(model: nn.Module) -> tuple[Name, ...]:
    """Turn all layers of a model with sparse kernels into dense ones again, in place, and return their names.

    Example:
        >>> densify(net := nn.Sequential(SparseLinear(nn.Linear(2, 3)))), net
        (('0',), Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
        ))
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for module in found.values():
        dense = module.dense()
        for parent, name in places_of(model, module):
            setattr(parent, name, dense)
    return tuple(found)


def places_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return all parents of a module in a model, with its name there.

    Example:
        >>> net = nn.Sequential(nn.ReLU(), nn.Tanh())
        >>> [name for _, name in places_of(net, net[1])]
        ['1']
    """
    return [(parent, n) for parent in model.modules() for n, m in parent._modules.items() if m is module]


def _compressed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each row begins, the columns of the entries that are not zero, and those entries."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        csr = weight.detach().to_sparse_csr()
    is_small = csr.values().numel() < 2**31 and max(weight.shape) < 2**31
    kind = torch.int32 if is_small else torch.int64
    return csr.crow_indices().to(kind), csr.col_indices().to(kind), csr.values()
