"""`nn.MultiheadAttention` whose inner widths are free of its embedding width, as they are after pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FlexibleAttention(nn.MultiheadAttention):
    """The same attention with the same parameter names; heads, and the widths of keys and values, can be any.

    `make_flexible_` turns a plain one into this in place; it is not built by itself. The widths are `head_dim` (of
    queries and keys) and `value_dim`; scores are divided by sqrt(`scored_dim`), the head's width when it was dense.
    """

    value_dim: int
    scored_dim: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does; see there for the arguments."""
        if is_causal and attn_mask is None:
            raise ValueError("`attn_mask` is needed beside `is_causal`, which is only a hint, but got None.")
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        mask = self._mask(query, key_padding_mask, attn_mask)
        q, k, v = self._projected(query, key, value)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.scored_dim**-0.5) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            mixed = F.dropout(weights, dropout) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scored_dim**-0.5)
        result = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not is_batched:
            result = result.squeeze(0)
        elif not self.batch_first:
            result = result.transpose(0, 1)
        if not need_weights:
            return result, None
        shown = weights.mean(1) if average_attn_weights else weights
        return result, shown if is_batched else shown.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys (batch, heads, length, head_dim) and values (batch, heads, length, value_dim)."""
        dims = (self.head_dim, self.head_dim, self.value_dim)
        widths = [self.num_heads * dim for dim in dims]
        packed = self.in_proj_weight
        weights = (
            packed.split(widths)
            if packed is not None
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = self.in_proj_bias.split(widths) if self.in_proj_bias is not None else (None, None, None)
        return [
            F.linear(x, cast(Tensor, w), b).unflatten(-1, (self.num_heads, dim)).transpose(1, 2)
            for x, w, b, dim in zip((query, key, value), weights, biases, dims, strict=True)
        ]

    def _mask(self, query: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Merge both masks into one that is added to scores (batch, heads, queries, keys)."""
        merged = None
        if mask is not None:
            merged = _as_addend(mask, query)
            merged = merged.view(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else merged
        if padding is not None:
            padded = _as_addend(padding if padding.dim() == 2 else padding.unsqueeze(0), query)[:, None, None]
            merged = padded if merged is None else merged + padded
        return merged


def _as_addend(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def can_be_flexible(module: nn.Module) -> bool:
    """Whether a module is a plain `nn.MultiheadAttention` without extra key and value positions."""
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn


def make_flexible_(module: nn.MultiheadAttention) -> None:
    """Turn a plain attention into a flexible one, in place; nothing else about it changes."""
    module.__class__ = FlexibleAttention
    flexible = cast(FlexibleAttention, module)
    flexible.value_dim, flexible.scored_dim = module.head_dim, float(module.head_dim)
    flexible._qkv_same_embed_dim = False  # or else nn.TransformerEncoderLayer would go around `forward`


@contextmanager
def flexible_attention(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let plain attentions run as flexible ones for a while, so that each product in them is seen."""
    changed = [module for module in modules if can_be_flexible(module)]
    try:
        for module in changed:
            make_flexible_(cast(nn.MultiheadAttention, module))
        yield
    finally:
        for module in changed:
            module.__class__ = nn.MultiheadAttention
            del vars(module)["value_dim"], vars(module)["scored_dim"]
            vars(module)["_qkv_same_embed_dim"] = module.in_proj_weight is not None
