"""What a choice among coupled groups asks of the model: sizes solved for, factors folded in, shapes checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_prune.graph.equations import solve
from lightning_prune.graph.integers import Attribute
from lightning_prune.graph.plan import Plan, Scale
from lightning_prune.graph.projection import Counts
from lightning_prune.graph.replay import replay
from lightning_prune.graph.rules.table import Op
from lightning_prune.graph.run import Run
from lightning_prune.graph.types import Type, atoms

if TYPE_CHECKING:
    from lightning_prune.graph.couplings import Couplings

Choice = Mapping[str, Tensor]
"""Group name -> bool (size,), True is kept."""


class Unsolvable(ValueError):  # noqa: N818
    """A choice that the model's code cannot follow.

    Args:
        reason: why.
        groups: those that are to blame; without them, another choice may do.
    """

    def __init__(self, reason: str, groups: Collection[str]) -> None:
        super().__init__(f"{reason}: {', '.join(groups)} cannot be pruned so.")
        self.reason, self.groups = reason, tuple(groups)


def plan_of(couplings: Couplings, choice: Choice) -> Plan:
    """Return what `Couplings.plan` does."""
    counts = {name: int(mask.sum()) for name, mask in choice.items()}
    atom_counts = couplings.by_atom(counts)
    found, broken = solve(couplings.record.equations, atom_counts)
    if broken:
        reason = "; ".join(dict.fromkeys(equation.reason for equation, _ in broken))
        _blame(couplings, (atom for _, involved in broken for atom in involved), reason, atom_counts)
    attributes = _attributes(couplings.run, found)
    if (wrong := replay(couplings.run, couplings.record, atom_counts, attributes)) is not None:
        reason, op = wrong
        _blame(couplings, _atoms_of(op), reason, atom_counts)
    return Plan(
        slices={
            name: {dim: tuple(mask.nonzero().flatten().tolist()) for dim, mask in kept.items()}
            for name, kept in couplings.kept(choice).items()
        },
        shapes=couplings.shapes,
        attributes=attributes,
        scales=_scales(couplings, atom_counts, found),
        replaced=_replaced(couplings.run, attributes),
        groups={name: (group.size, counts.get(name, group.size)) for name, group in couplings.groups.items()},
    )


def _atoms_of(op: Op | None) -> list[Type]:
    """Return the atoms that an operation has to do with."""
    if op is None:
        return []
    return [atom for _, types in [*op.inputs, *op.outputs] for node in types for atom in atoms(node)]


def _blame(couplings: Couplings, candidates: Iterable[Type], reason: str, counts: Counts) -> None:
    """Raise with the groups among `candidates` that lose indices; with all that do, where none is among them."""
    names = {group.atom: name for name, group in couplings.groups.items()}
    losing = {atom for atom, count in counts.items() if count < atom.size}
    guilty = dict.fromkeys(names[a] for a in candidates if a in losing)
    raise Unsolvable(reason, list(guilty or dict.fromkeys(names[a] for a in losing)))


def _scales(couplings: Couplings, counts: Counts, found: Mapping[Attribute, int]) -> tuple[Scale, ...]:
    """Return the factors that keep scores as they were where the code derives them from a size that changes."""
    scales: list[Scale] = []
    for folding in couplings.foldings:
        factor = folding.correction(counts, found)
        if factor == 1.0:
            continue
        if not folding.targets:
            _blame(couplings, folding.atoms(), f"{folding.where} derives a factor from a size", counts)
        scales += [s for s in folding.scales(factor) if s not in scales]
    return tuple(scales)


def _attributes(run: Run, found: Mapping[Attribute, int]) -> dict[str, dict[str, Any]]:
    """Return the attributes that change: path -> name -> value."""
    modules = {path: module for module, path in run.paths.items()}
    changed: dict[str, dict[str, Any]] = {}
    for attribute, value in found.items():
        if value == attribute.value:
            continue
        place = changed.setdefault(attribute.path, {})
        if attribute.index is None:
            place[attribute.name] = value
        else:
            entries = list(place.get(attribute.name, vars(modules[attribute.path])[attribute.name]))
            entries[attribute.index] = value
            place[attribute.name] = tuple(entries)
    return changed


def _replaced(run: Run, attributes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {
        path: "attention"
        for module, path in run.paths.items()
        if type(module) is nn.MultiheadAttention
        and {"num_heads", "head_dim", "value_dim"} & set(attributes.get(path, {}))
    }
