"""Operations that work entry by entry: what lies at one position belongs together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.refinement import cut, unify
from lightning_prune.graph.rules.table import Op, Types, rule
from lightning_prune.graph.types import Type, find, frozen_type


def broadcast(all_types: Sequence[Types]) -> Types:
    """Unify dims from the right, as broadcasting aligns them; a size of 1 goes along with anything."""
    result: Types = []
    for from_right in range(1, max(map(len, all_types), default=0) + 1):
        column = [types[-from_right] for types in all_types if len(types) >= from_right]
        wide = [node for node in column if find(node).size != 1]
        for node in wide[1:]:
            unify(wide[0], node)
        result.insert(0, (wide or column)[0])
    return result


@rule(
    *("pointwise", "_prelu_kernel", "addcmul", "addcdiv", "lerp", "where", "masked_fill", "native_dropout"),
    *("dropout", "bernoulli", "_fused_dropout", "fill", "zero", "_to_copy", "contiguous", "lift_fresh_copy"),
    *("relu", "relu6", "gelu", "silu", "mish", "elu", "celu", "selu", "sigmoid", "softplus", "threshold"),
    *("hardswish", "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "leaky_relu", "rrelu_with_noise"),
    *("log_sigmoid_forward", "isnan", "isinf", "nan_to_num", "to"),
)
def pointwise(op: Op) -> Types | list[Types]:
    """Unify the inputs; the output is like them."""
    tensors = [t for t in tree_leaves((op.args, op.kwargs)) if isinstance(t, Tensor)]
    types = broadcast([op.types(t) for t in tensors])
    if not isinstance(op.output, Tensor):
        return [types for _ in op.output]
    return fitted(types, op.shape)


def fitted(types: Types, shape: Sequence[int]) -> Types:
    """Return types for a shape that `types` are broadcast to."""
    padded: list[Type] = [frozen_type(1, "of size 1")] * (len(shape) - len(types)) + types
    return [
        node if find(node).size == n else frozen_type(n, "broadcast")
        for node, n in zip(padded, shape, strict=True)
    ]


@rule(
    *("alias", "clone", "detach", "lift", "lift_fresh", "view_dtype", "alias_copy", "detach_copy"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "resolve_conj"),
    *("conj", "_conj", "conj_physical", "real", "imag", "_neg_view", "resolve_neg"),
)
def same(op: Op) -> Types:
    """Return what came in."""
    return op.first


@rule("copy")
def copy(op: Op) -> Types:
    """Overwrite the first tensor with the second."""
    source = op[1]
    if source is not None:
        broadcast([op.first, source])
    return op.first


@rule("glu")
def glu(op: Op) -> Types:
    """Gate one half of a dim by the other."""
    d = op.dim(1, default=-1)
    first, second = cut(op.first[d], find(op.first[d]).size // 2)
    unify(first, second)
    return [*op.first[:d], first, *op.first[d + 1 :]]
