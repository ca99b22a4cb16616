"""Which slices of which tensors are coupled: the groups of a model, and what a choice among them means for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.core.patterns import listed
from lightning_prune.graph.depth import Block, find_blocks, find_branches
from lightning_prune.graph.equations import ties
from lightning_prune.graph.groups import Group, Places, find_groups, recognised
from lightning_prune.graph.plan import Plan
from lightning_prune.graph.planning import Choice, plan_of
from lightning_prune.graph.projection import Counts, mask_of, size_of
from lightning_prune.graph.record import Record
from lightning_prune.graph.run import Run
from lightning_prune.graph.scales import Folding, fold_scales
from lightning_prune.graph.trace import record_run
from lightning_prune.graph.types import atoms, find, freeze, is_frozen


class Couplings:
    """The coupled groups of a model, as one run of it has shown.

    Args:
        run: the call that was traced.
        record: what it has shown.
    """

    def __init__(self, run: Run, record: Record) -> None:
        self.run, self.record = run, record
        self.shapes = {name: tuple(t.shape) for name, (t, _) in record.tensors.items()}
        self.followed: Mapping[str, str] = {}
        """Tensor that does not run -> the one whose sizes it takes on, as an average of it does."""

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The groups that can be pruned, by name, in the order of the model; freezing some renames no other."""
        return {name: group for name, group in self._found.items() if not is_frozen(group.atom)}

    @cached_property
    def _found(self) -> dict[str, Group]:
        return find_groups(self.record, self.run.root)

    @property
    def used(self) -> set[str]:
        """The names of the parameters and buffers that the traced call has read."""
        read = {id(tensor) for op in self.record.ops for tensor, _ in op.inputs}
        return {name for name, (tensor, _) in self.record.tensors.items() if id(tensor) in read}

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """The residual blocks that can be skipped as wholes, by path."""
        return find_blocks(self.record)

    @cached_property
    def branches(self) -> dict[str, Block]:
        """The branches whose sum with the residual stream can go without them, by path."""
        return find_branches(self.record)

    @cached_property
    def foldings(self) -> list[Folding]:
        """Where the code derives a factor from a size, and what can take up its correction."""
        return fold_scales(self.record)

    @property
    def frozen(self) -> dict[str, str]:
        """Why the other dims stay whole: "parameter[dim]" -> reason."""
        found = {}
        for name, (_, types) in self.record.tensors.items():
            for dim, node in enumerate(types):
                if find(node).size > 1 and is_frozen(node):
                    reasons = dict.fromkeys(atom.reason for atom in atoms(node) if atom.reason)
                    found[f"{name}[{dim}]"] = "; ".join(reasons) or "pieces of size 1"
        return found

    @cached_property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups that must keep equally many indices, though not the same ones."""
        names = {group.atom: name for name, group in self.groups.items()}
        sets: dict[str, set[str]] = {}
        for a, b in ties(self.record.equations):
            if a in names and b in names:
                merged = sets.get(names[a], {names[a]}) | sets.get(names[b], {names[b]})
                sets |= dict.fromkeys(merged, merged)
        order = list(self.groups)
        unique = {tuple(sorted(s, key=order.index)) for s in sets.values() if len(s) > 1}
        return tuple(sorted(unique, key=lambda t: order.index(t[0])))

    def freeze(self, names: Iterable[str], reason: str) -> None:
        """Take groups out for good: they move to `frozen`."""
        for name in names:
            freeze(self.groups[name].atom, reason)
        self._forget()

    def unfit_with(self, name: str, seen: set[Kind]) -> list[str]:
        """Return a group that cannot follow, and all of its kind where it is the second one.

        So are the others, which takes long to find out one by one.

        Args:
            name: of the group.
            seen: the kinds of those before, to which this one is added.
        """
        kinds = {other: (group.kind, group.role) for other, group in self.groups.items()}
        kind = kinds[name]
        found = [other for other in kinds if kinds[other] == kind] if kind in seen else [name]
        seen.add(kind)
        return found

    def left(self, counts: Mapping[str, int]) -> dict[str, tuple[str, Places]]:
        """Return role and places of what is still a group when groups keep `counts` indices, frozen or not."""
        groups = self._found.items()
        return {name: (g.role, g.places) for name, g in groups if counts.get(name, g.size) > 1}

    def kept_of(self, slices: Mapping[str, Mapping[int, Sequence[int]]]) -> dict[str, Tensor]:
        """Return which indices of each group, frozen or not, tensors still have that were cut: bool (size,)."""
        found = {}
        for name, group in self._found.items():
            found[name] = torch.ones(group.size, dtype=torch.bool)
            for member in group.members:
                if (kept := slices.get(member.tensor, {}).get(member.dim)) is not None:
                    along = torch.zeros(self.shapes[member.tensor][member.dim])
                    along[list(kept)] = 1.0
                    found[name] &= member.project(along) > 0
        return found

    def recognise(self, before: Mapping[str, tuple[str, Places]]) -> None:
        """Give the groups the names and roles that they had in a larger model, of which `left` has returned them."""
        self._found = recognised(self._found, before)
        self._forget()

    def _forget(self) -> None:
        for cached in ("groups", "ties"):
            self.__dict__.pop(cached, None)

    def sizes(self, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors when groups keep `counts` indices; those not named stay whole."""
        atom_counts, tensors = self.by_atom(counts), self.record.tensors
        return {
            name: tuple(size_of(node, atom_counts) for node in tensors[self.followed.get(name, name)][1])
            for name in tensors
        }

    def num_params(self, counts: Mapping[str, int]) -> int:
        """Return the number of parameters of the model when groups keep `counts` indices."""
        sizes, tensors = self.sizes(counts), self.record.tensors
        return sum(math.prod(sizes[name]) for name, (t, _) in tensors.items() if isinstance(t, nn.Parameter))

    def num_bytes(self, counts: Mapping[str, int]) -> int:
        """Return the bytes of parameters and buffers when groups keep `counts` indices."""
        sizes = self.sizes(counts)
        return sum(math.prod(sizes[name]) * t.element_size() for name, (t, _) in self.record.tensors.items())

    def macs(self, counts: Mapping[str, int]) -> int:
        """Return the multiply-accumulates of the traced call when groups keep `counts` indices."""
        atom_counts = self.by_atom(counts)
        return sum(
            math.prod(size_of(node, atom_counts) for node in term)
            for op in self.record.ops
            for term in op.macs
        )

    def masks(self, choice: Choice) -> dict[str, Tensor]:
        """Return masks of the tensors that a choice touches, True is kept; views that are broadcast, not copies."""
        found = {}
        for name, kept in self.kept(choice).items():
            mask = torch.ones((), dtype=torch.bool)
            for dim, along in kept.items():
                mask = mask & along.view([-1 if d == dim else 1 for d in range(len(self.shapes[name]))])
            found[name] = mask.expand(self.shapes[name])
        return found

    def plan(self, choice: Choice) -> Plan:
        """Return what has to be done to the model, all sizes solved for and checked in a run on fake tensors.

        Raises:
            Unsolvable: the model's code has sizes that cannot follow this choice.
        """
        return plan_of(self, choice)

    def by_atom(self, counts: Mapping[str, int]) -> Counts:
        """Return the counts of groups by their atoms."""
        return {self.groups[name].atom: count for name, count in counts.items()}

    def kept(self, choice: Choice) -> dict[str, dict[int, Tensor]]:
        """Return masks along the dims of the tensors that lose something."""
        masks = {self.groups[name].atom: mask.cpu() for name, mask in choice.items() if not bool(mask.all())}
        found: dict[str, dict[int, Tensor]] = {}
        for name, (_, types) in self.record.tensors.items():
            for dim, node in enumerate(types):
                if any(atom in masks for atom in atoms(node)):
                    found.setdefault(name, {})[dim] = mask_of(node, masks)
        return found


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    root: nn.Module | None = None,
    training: bool = False,
) -> Couplings:
    """Run a model once and find out which slices of its tensors are coupled.

    Weights are not read and nothing is changed. The run is on fake tensors, which have shapes and no values, or on
    real ones where the model's code reads values.

    Args:
        model: any module that runs.
        args: positional arguments of an example call; a batch of 2 or more tells most.
        kwargs: keyword arguments.
        root: the module of which `model` is a part, if names are to be those of the root; by default the model.
        training: whether to run it in training mode; else it is where only that shows what the modules read.

    Raises:
        ValueError: a module was scripted, so that nothing of it can be seen.
        Exception: whatever the model itself raises on these arguments.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> couplings = trace(net, (torch.zeros(2, 4),))
        >>> [(group.name, group.size, group.tensors) for group in couplings.groups.values()]
        [('0.weight', 8, ('0.weight', '0.bias', '2.weight'))]
        >>> couplings.frozen["2.weight[0]"]
        'output of the model'
    """
    root = root or model
    if scripted := [
        path or "the model" for path, m in root.named_modules() if isinstance(m, torch.jit.ScriptModule)
    ]:
        raise ValueError(
            f"`model` runs as Python code, but got scripted modules, {listed(scripted)}: prune it before it is "
            "scripted."
        )
    named = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    paths = {module: path for path, module in root.named_modules()}
    run = Run(model, root, tuple(args), dict(kwargs or {}), named, paths, training)
    found = Couplings(run, record_run(run))
    return found if training else _seen_in_training(found) or found


Kind: TypeAlias = tuple[str, str]
"""What a group is built like, and its role: groups of one kind mostly share their fate."""
NORMS = {
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
    "mean",
    "var",
    "std",
    "var_mean",
    "std_mean",
}


def _seen_in_training(couplings: Couplings) -> Couplings | None:
    """Return what a run in training mode shows, where only that reads all that the modules have which the call ran.

    So it is with noise that layers add to their weights while they train. None where it has fewer groups, or other
    norms, whose statistics a proof in eval mode could not tell apart.
    """
    run, record = couplings.run, couplings.record
    read, ran = couplings.used, {call.path for call in record.calls}
    unread = [
        name
        for name, tensor in run.named.items()
        if name not in read
        and name.rpartition(".")[0] in ran
        and tensor.is_floating_point()
        and tensor.numel() > 1
    ]
    if not unread:
        return None
    told = replace(run, training=True)
    try:
        found = Couplings(told, record_run(told, fake_alone=record.is_fake))
    except Exception:  # whatever the model's code needs to train that a call does not give
        return None
    is_more = read <= found.used and not found.used.isdisjoint(unread)
    is_alike = _norms(found) == _norms(couplings) and len(found.groups) >= len(couplings.groups)
    return found if is_more and is_alike else None


def _norms(couplings: Couplings) -> list[str]:
    """Return the operations over means and variances of channels, in their order."""
    return [op.name for op in couplings.record.ops if op.name in NORMS]
