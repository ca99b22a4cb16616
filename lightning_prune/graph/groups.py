"""Groups: the atoms that are left unfrozen, with a name, a role and all places where they occur."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias

from torch import Tensor, nn

from lightning_prune.graph.projection import occurrences, project
from lightning_prune.graph.record import Record
from lightning_prune.graph.rules.products import BATCHED, GROUPED
from lightning_prune.graph.types import Type, atoms, factors, find, is_frozen

ROLES = ("channel", "head", "head_dim", "part")
Places: TypeAlias = tuple[tuple[str, int], ...]
"""Where a group occurs: tensors and dims."""


@dataclass(frozen=True, eq=False)
class Member:
    """A dim of a parameter or buffer in which a group occurs.

    Args:
        tensor: its name.
        dim: of the tensor.
        type: of the dim.
        atom: of the group.
        numel: entries of the tensor.
        is_parameter: whether it is a parameter, or else a buffer.
    """

    tensor: str
    dim: int
    type: Type
    atom: Type
    numel: int
    is_parameter: bool

    def project(self, values: Tensor) -> Tensor:
        """Sum values (size of the dim,) over the positions of each index of the group; returns (group size,)."""
        return project(values, self.type, self.atom)

    @property
    def num(self) -> int:
        """The number of entries of the tensor that belong to each index of the group."""
        return self.numel * occurrences(self.type, self.atom) // find(self.type).size


@dataclass(frozen=True, eq=False)
class Group:
    """Coupled slices: to remove index i is to remove slice i of every member.

    Args:
        name: of its first member, with its role where that is not "channel".
        size: number of indices.
        role: "head" for the outer factor of a dim that attention splits into heads, "head_dim" for the inner one,
            "channel" for all else; but where a dim is another product of two, as in a grouped convolution, only the
            larger factor is a "channel" and the smaller one a "part".
        kind: equal for groups that are built alike, as those of repeated layers are: the types of the modules that they
            run through, with the parameters and dims, in their order. Names of modules do not count.
        members: where it occurs.
        atom: its type.
    """

    name: str
    size: int
    role: str
    kind: str
    members: tuple[Member, ...]
    atom: Type = field(repr=False)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors in which it occurs, each once."""
        return tuple(dict.fromkeys(member.tensor for member in self.members))

    @property
    def places(self) -> Places:
        """Where it occurs."""
        return tuple((member.tensor, member.dim) for member in self.members)

    @property
    def is_renormalised(self) -> bool:
        """Whether a mean or a variance runs over it, which is that of the surviving indices afterwards."""
        return "renormalised" in self.atom.notes


def find_groups(record: Record, root: nn.Module) -> dict[str, Group]:
    """Return the groups of a traced model by name, in the order of its parameters.

    Args:
        record: of its call.
        root: the module that the names of tensors begin from.
    """
    owners = {path: type(module).__name__ for path, module in root.named_modules(remove_duplicate=False)}
    members: dict[Type, list[Member]] = {}
    for name, (tensor, types) in record.tensors.items():
        for dim, node in enumerate(types):
            for atom in dict.fromkeys(a for a in atoms(node) if not is_frozen(a)):
                is_parameter = isinstance(tensor, nn.Parameter)
                member = Member(name, dim, node, atom, tensor.numel(), is_parameter)
                members.setdefault(atom, []).append(member)
    roles = _roles(record, members)
    groups: dict[str, Group] = {}
    for atom, found in members.items():
        if any(member.is_parameter for member in found):
            name = _name(found[0], roles[atom], groups)
            groups[name] = Group(name, atom.size, roles[atom], _kind(found, owners), tuple(found), atom)
    return groups


def recognised(found: Mapping[str, Group], before: Mapping[str, tuple[str, Places]]) -> dict[str, Group]:
    """Give groups of a model that has become smaller the names and roles that they had in the larger one.

    Both follow from what else there is, and a group of which one index is left is none any more.

    Args:
        found: the groups of the smaller model.
        before: name -> role and places, of those that are left.
    """
    known: dict[Places, list[tuple[str, str]]] = {}
    for name, (role, places) in before.items():
        known.setdefault(places, []).append((name, role))
    groups: dict[str, Group] = {}
    for group in found.values():
        if same := known.get(group.places):  # in one place they are told apart by their order
            name, role = same.pop(0)
        else:
            name, role = _name(group.members[0], group.role, {*before, *groups}), group.role
        groups[name] = replace(group, name=name, role=role)
    return groups


def _name(first: Member, role: str, taken: Container[str]) -> str:
    base = first.tensor + ("" if role == "channel" else f"[{role}]")
    names = [base, f"{base}[dim {first.dim}]"]
    numbered = (f"{base}[dim {first.dim}, {i}]" for i in range(2, 1_000_000))
    return next(name for name in chain(names, numbered) if name not in taken)


def _kind(members: Iterable[Member], owners: Mapping[str, str]) -> str:
    """Describe how a group is built: alike for repeated layers, however they are called."""
    parts = []
    for member in members:
        path, _, key = member.tensor.rpartition(".")
        parts.append(f"{owners[path]}.{key}[{member.dim}]")
    return ", ".join(parts)


def _roles(record: Record, live: Iterable[Type]) -> dict[Type, str]:
    """Tell heads from widths: a dim that batched products run over is a head, what it is multiplied with a width."""
    roles = dict.fromkeys(live, "channel")
    for outer, inner in _factor_pairs(record):
        if BATCHED in outer.notes:  # frozen or not
            roles[outer] = "head"
            if GROUPED not in inner.notes and BATCHED not in inner.notes:
                roles[inner] = "head_dim"
        elif roles.get(outer) == roles.get(inner) == "channel":
            roles[inner if outer.size > inner.size else outer] = "part"
    return {atom: role for atom, role in roles.items() if atom in set(live)}


def _factor_pairs(record: Record) -> Iterator[tuple[Type, Type]]:
    """Yield (outer, inner) atoms of all products in the model's tensors, inner ones that are not frozen."""
    seen: set[tuple[Type, Type]] = set()
    for _, types in record.tensors.values():
        for node in types:
            for product in _products(node):
                parts = [list(atoms(factor)) for factor in factors(product)]
                pairs = (
                    (a, b)
                    for i, outer in enumerate(parts)
                    for a in outer
                    for inner in parts[i + 1 :]
                    for b in inner
                    if not is_frozen(b)
                )
                for pair in pairs:
                    if pair not in seen and pair[0] is not pair[1]:
                        seen.add(pair)
                        yield pair


def _products(node: Type) -> Iterator[Type]:
    node = find(node)
    if node.kind == "product":
        yield node
    for part in node.parts:
        yield from _products(part)
