"""Sizes that torch's own modules keep beside their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.graph.sandbox import mode_of_training


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """Return the sizes that a module of torch should have, going by its weights; none for other modules.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> layer.weight.data = layer.weight.data[:, :1]
        >>> sizes_of(layer)
        {'in_features': 1, 'out_features': 3}
    """
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent(module)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if not (dims := dims_of(module)):
        return {}
    with mode_of_training(module.modules(), False), torch.no_grad():  # or a parametrization may write
        weight: Any = getattr(module, "weight", None)
    if isinstance(module, _NormBase):
        vector: Any = weight if weight is not None else module.running_mean
        return {} if vector is None else {"num_features": len(vector)}
    if weight is None:
        return {}
    shape = tuple(weight.shape)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": shape}
    inner = "out_channels" if getattr(module, "transposed", False) else "in_channels"
    return {
        name: shape[dim] * (getattr(module, "groups", 1) if name == inner else 1)
        for name, dim in dims.items()
    }


def dims_of(module: nn.Module) -> dict[Any, int]:
    """Return along which dim of its weight a module of torch has each of its sizes; of a tuple by (name, index).

    What a grouped convolution sums over is so many for each of its groups.

    Example:
        >>> dims_of(nn.Linear(2, 3))
        {'in_features': 1, 'out_features': 0}
        >>> dims_of(nn.LayerNorm((4, 5)))
        {('normalized_shape', 0): 0, ('normalized_shape', 1): 1}
    """
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {("normalized_shape", dim): dim for dim in range(len(module.normalized_shape))}
    if isinstance(module, _ConvNd):
        inputs = 0 if module.transposed else 1
        return {"in_channels": inputs, "out_channels": 1 - inputs}
    found: dict[Any, dict[Any, int]] = {
        nn.Linear: {"in_features": 1, "out_features": 0},
        nn.Bilinear: {"in1_features": 1, "in2_features": 2, "out_features": 0},
        (nn.Embedding, nn.EmbeddingBag): {"num_embeddings": 0, "embedding_dim": 1},
        _NormBase: {"num_features": 0},
        nn.GroupNorm: {"num_channels": 0},
        nn.PReLU: {"num_parameters": 0},
    }
    return next((dims for kind, dims in found.items() if isinstance(module, kind)), {})


def _recurrent(module: Any) -> dict[str, Any]:
    """Return the sizes that all layers and directions agree on; what they do not agree on stays."""
    inputs: Any = module.weight_ih_l0 if isinstance(module, nn.RNNBase) else module.weight_ih
    hidden = [p for name, p in module.named_parameters() if name.startswith("weight_hh")]
    sizes = {"input_size": {inputs.shape[1]}}
    if getattr(module, "proj_size", 0):
        sizes["proj_size"] = {p.shape[1] for p in hidden}
        sizes["hidden_size"] = {p.shape[1] for n, p in module.named_parameters() if n.startswith("weight_hr")}
    else:
        sizes["hidden_size"] = {p.shape[1] for p in hidden}
    return {name: found.pop() for name, found in sizes.items() if len(found) == 1}


def _attention(module: Any) -> dict[str, Any]:
    packed = module.in_proj_weight
    keys, values = (packed, packed) if packed is not None else (module.k_proj_weight, module.v_proj_weight)
    return {"embed_dim": len(module.out_proj.weight), "kdim": keys.shape[1], "vdim": values.shape[1]}
