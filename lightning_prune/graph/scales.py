"""Factors that code derives from a size, as attention's 1 / sqrt(head_dim): where a correction can be folded in.

When head_dim shrinks, such a factor grows, and the small model would no longer equal the masked one. The correction is
multiplied into the weights that produce what is scaled: attention scores are linear in the query, and the query in the
rows of its projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.graph.integers import Environment, Expression, attributes_of, evaluate, types_of
from lightning_prune.graph.plan import Scale
from lightning_prune.graph.projection import Counts
from lightning_prune.graph.python_calls import ScaleSite
from lightning_prune.graph.record import Record
from lightning_prune.graph.rules.table import Op
from lightning_prune.graph.types import Type, atoms

Target = tuple[str, int]
"""A parameter's name, and the dim along which some slices feed the tensor that is scaled."""
Sources = dict[Target, list[Tensor]]
"""For each target, which slices each entry of a tensor comes from: one number per term, -1 where it is no source."""

RESHAPING = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
REARRANGING = {
    *RESHAPING,
    *("permute", "transpose", "t", "unsqueeze", "squeeze"),
    *("expand", "clone", "contiguous", "slice", "select", "split", "split_with_sizes", "unbind", "repeat"),
    *("unsafe_split", "unsafe_chunk", "alias", "detach", "roll", "flip", "cat", "stack", "index_select"),
}
HOMOGENEOUS = {"neg", "relu", "leaky_relu", "_to_copy", "native_dropout", "dropout", "lift_fresh"}
NORMS = {
    "native_layer_norm": (2, 3),
    "_fused_rms_norm": (2,),
    "native_batch_norm": (1, 2),
    "_native_batch_norm_legit_no_training": (1, 2),
}


@dataclass(frozen=True, eq=False)
class Folding:
    """One place where a factor follows from sizes, and the slices that can take up its correction.

    Args:
        factor: how the code computes it.
        targets: (parameter, dim) -> slices; empty where none were found.
        where: for messages.
        involved: types whose sizes the factor depends on, directly or through an attribute.
    """

    factor: Expression
    targets: Mapping[Target, tuple[int, ...]]
    where: str
    involved: tuple[Type, ...]

    def correction(self, counts: Counts, attributes: Environment) -> float:
        """Return what the scaled tensor has to be multiplied with, 1 where nothing changes."""
        return evaluate(self.factor, {}, {}) / evaluate(self.factor, counts, attributes)

    def scales(self, factor: float) -> list[Scale]:
        """Return the multiplications that make up for it."""
        return [Scale(name, dim, rows, factor) for (name, dim), rows in self.targets.items()]

    def atoms(self) -> Iterator[Type]:
        """Yield the atoms that the factor depends on."""
        for node in self.involved:
            yield from atoms(node)


def fold_scales(record: Record) -> list[Folding]:
    """Find, for each factor that follows from sizes, the weights that can take up its correction."""
    finder = _Finder(record)
    by_attribute: dict[Any, list[Type]] = {}
    for equation in record.equations:
        for attribute in attributes_of(equation.expression):
            by_attribute.setdefault(attribute, []).append(equation.type)
    foldings = []
    for site in record.scales:
        involved = list(types_of(site.factor))
        for attribute in attributes_of(site.factor):
            involved += by_attribute.get(attribute, [])
        if involved:
            foldings.append(Folding(site.factor, finder.targets(site), site.where, tuple(involved)))
    return foldings


class _Finder:
    """Walks from a tensor back to the products that it is linear in."""

    def __init__(self, record: Record) -> None:
        self.names = {id(tensor): name for name, (tensor, _) in record.tensors.items()}
        self.ops = record.ops
        self.made_by: dict[int, list[int]] = {}
        for position, op in enumerate(record.ops):
            for tensor, _ in op.outputs:
                self.made_by.setdefault(id(tensor), []).append(position)

    def targets(self, site: ScaleSite) -> dict[Target, tuple[int, ...]]:
        """Return the slices that feed the tensor, or nothing where it is not linear in parameters."""
        sources = self._sources(site.tensor, site.position) or {}
        return {
            target: tuple(int(i) for i in torch.cat([r.flatten() for r in rows]).unique() if i >= 0)
            for target, rows in sources.items()
        }

    def _sources(self, tensor: Tensor, before: int) -> Sources | None:
        if id(tensor) in self.names:
            shape = [1] * tensor.dim()
            if not shape:
                return None
            rows = torch.arange(tensor.shape[0]).view([-1, *shape[1:]]).expand(tensor.shape)
            return {(self.names[id(tensor)], 0): [rows]}
        earlier = [p for p in self.made_by.get(id(tensor), []) if p < before]
        if not earlier:
            return None
        op = self.ops[earlier[-1]]
        if op.name in REARRANGING:
            return self._rearranged(op, tensor, earlier[-1])
        if op.name in HOMOGENEOUS:
            return self._sources(op.args[0], earlier[-1])
        if op.name in ("mul", "div"):
            return self._of_factors(op, earlier[-1])
        if op.name in ("add", "sub"):
            return self._of_terms(op, earlier[-1])
        return self._of_product(op, earlier[-1])

    def _rearranged(self, op: Op, tensor: Tensor, position: int) -> Sources | None:
        """Send the slices' numbers through the same operation."""
        inputs = [t for t in tree_leaves(op.args) if isinstance(t, Tensor)]
        found = [self._sources(t, position) for t in inputs]
        if any(sources is None for sources in found):
            return None
        which = next(k for k, (t, _) in enumerate(op.outputs) if t is tensor)
        result: Sources = {}
        for t, sources in zip(inputs, found, strict=True):
            for target, terms in (sources or {}).items():
                for rows in terms:
                    result.setdefault(target, []).append(_moved(op, _StandIn(t, rows), which))
        return result

    def _of_factors(self, op: Op, position: int) -> Sources | None:
        """Of a product entry by entry, one factor takes it up: the first that can."""
        operands = [a for a in (op.args[:1] if op.name == "div" else op.args) if isinstance(a, Tensor)]
        for operand in sorted(operands, key=lambda t: id(t) in self.names):
            if (sources := self._sources(operand, position)) is not None:
                shape = op.shape
                return {target: [rows.expand(shape) for rows in terms] for target, terms in sources.items()}
        return None

    def _of_terms(self, op: Op, position: int) -> Sources | None:
        """Of a sum, all terms must take it up."""
        result: Sources = {}
        for operand in op.args[:2]:
            sources = self._sources(operand, position) if isinstance(operand, Tensor) else None
            if sources is None:
                return None
            for target, terms in sources.items():
                result.setdefault(target, []).extend(rows.expand(op.shape) for rows in terms)
        return result

    def _of_product(self, op: Op, position: int) -> Sources | None:
        if op.name in NORMS:
            parameters = op.args[NORMS[op.name][0] : NORMS[op.name][-1] + 1]
            return self._of_affine(op, parameters, dim=1 if "batch_norm" in op.name else -1)
        if op.name == "convolution" and not op.args[6]:
            return self._of_affine(op, op.args[1:3], dim=1)
        if op.name == "embedding" and id(op.args[0]) in self.names:
            return {(self.names[id(op.args[0])], 1): [torch.arange(op.shape[-1]).expand(op.shape)]}
        left = op.args[1 if op.name in ("addmm", "baddbmm") else 0] if op.args else None
        if op.name not in ("mm", "addmm", "bmm", "baddbmm"):
            return None
        weight = self._parameter(op.args[2 if op.name in ("addmm", "baddbmm") else 1], position)
        if weight is not None:
            rows = torch.arange(op.shape[-1]).expand(op.shape)
            bias = {} if op.name == "mm" else self._vector(op.args[0], rows)
            return None if bias is None else {weight: [rows], **bias}
        sources = (
            self._sources(left, position) if isinstance(left, Tensor) and op.name in ("mm", "bmm") else None
        )
        return sources and {
            t: _spread(torch.cat([r.flatten() for r in rows]), op.shape) for t, rows in sources.items()
        }

    def _of_affine(self, op: Op, parameters: Any, dim: int) -> Sources | None:
        """Return scale and shift, or kernel and bias, as sources along one dim of the output."""
        if not isinstance(parameters[0], Tensor):
            return None
        size = op.shape[dim]
        view = [1] * len(op.shape)
        view[dim] = size
        result: Sources = {}
        for parameter in parameters:
            if parameter is not None:
                name = self.names.get(id(parameter))
                if name is None or parameter.shape[0] != size:
                    return None
                result[name, 0] = [torch.arange(size).view(view).expand(op.shape)]
        return result

    def _vector(self, tensor: Tensor, rows: Tensor) -> Sources | None:
        name = self.names.get(id(tensor))
        return {(name, 0): [rows]} if name is not None and tensor.dim() == 1 else None

    def _parameter(self, tensor: Tensor, before: int) -> Target | None:
        """Return the parameter behind the right operand (k, n) of a product, and which of its dims is n."""
        dim, num = tensor.dim() - 1, 0
        while id(tensor) not in self.names and num < 4:
            earlier = [p for p in self.made_by.get(id(tensor), []) if p < before]
            if not earlier or self.ops[earlier[-1]].name not in ("t", "transpose", "permute", "_to_copy"):
                return None
            op = self.ops[earlier[-1]]
            dim, num = (tensor.dim() - 1 - dim if op.name != "_to_copy" else dim), num + 1
            tensor = op.args[0]
            if tensor.dim() != 2:
                return None
        return (self.names[id(tensor)], dim) if id(tensor) in self.names else None


@dataclass(frozen=True, eq=False)
class _StandIn:
    """Puts slice numbers in the place of one tensor, and -1 in that of all others."""

    tensor: Tensor
    rows: Tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.rows if tensor is self.tensor else torch.full(tensor.shape, -1)


def _moved(op: Op, stand_in: _StandIn, which: int) -> Tensor:
    """Return one output of an operation that rearranges, for slice numbers in the place of one input.

    Numbers lie elsewhere in memory than what they stand for, so that a view of them may need a copy.
    """
    args = tree_map_only(Tensor, stand_in, op.args)
    if op.name in RESHAPING:
        moved: Tensor = args[0].reshape(op.shape)
        return moved
    kwargs = {k: v for k, v in op.kwargs.items() if k not in ("dtype", "device", "memory_format")}
    output = op.func(*args, **kwargs)
    return output if isinstance(output, Tensor) else output[which]


def _spread(rows: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Lay the slices of an operand (..., m, k) over a product (..., m, n): as a set, each entry reads all of its row.

    Only the set of all slices is asked for in the end, so it does not matter which entry shows which of them. Where the
    product has fewer entries than there are slices, there are several terms.
    """
    unique, total = rows.unique(), torch.Size(shape).numel()
    num_terms = -(-len(unique) // max(total, 1))
    repeated = unique.repeat(-(-num_terms * total // max(len(unique), 1)))[: num_terms * total]
    return [term.view(shape) for term in repeated.split(max(total, 1))] if total else []
