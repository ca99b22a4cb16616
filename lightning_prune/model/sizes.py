"""Sizes that torch's own modules keep beside their weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


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
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, _NormBase):
        vector: Any = weight if weight is not None else module.running_mean
        return {} if vector is None else {"num_features": len(vector)}
    return {} if weight is None else _by_weight(module, tuple(weight.shape))


def _by_weight(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    if isinstance(module, _ConvNd):
        inputs, outputs = (shape[0], shape[1]) if module.transposed else (shape[1], shape[0])
        if module.transposed:
            return {"in_channels": inputs, "out_channels": outputs * module.groups}
        return {"in_channels": inputs * module.groups, "out_channels": outputs}
    if isinstance(module, nn.Linear):
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(module, nn.Bilinear):
        return {"in1_features": shape[1], "in2_features": shape[2], "out_features": shape[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": shape}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": shape[0]}
    return {"num_parameters": shape[0]} if isinstance(module, nn.PReLU) else {}


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
