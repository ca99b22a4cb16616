"""Submodules that are averages of others: known by their structure and by what becomes of them, and cut alike.

A moving average of weights, or a mean teacher, is built as what it is an average of, gets no gradient, and changes all
the same. A teacher that stays as it is does not change, and a second network gets gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_prune.core.packing import INTEGERS
from lightning_prune.core.patterns import listed
from lightning_prune.graph import Couplings, Plan

ADVICE = (
    "Average by Lightning's WeightAveraging, or distil by Distillation, which keep their copies outside of the module, "
    "or set shrink='never'."
)


@dataclass
class Suspect:
    """A submodule that may be an average of another one.

    Args:
        originals: paths of what it may be an average of: of its values, or else all of its structure.
        is_equal: whether its values were those of an original, and not the ones and zeros that all norms begin with.
        runs: whether it runs in the traced call, as a part of the model.
        total: of the bits of its parameters.
    """

    originals: tuple[str, ...]
    is_equal: bool
    runs: bool
    total: int


class Copies:
    """The submodules of a model that may be averages of others, watched while it trains.

    Args:
        model: before the first step.
        couplings: of a call of it.
    """

    def __init__(self, model: nn.Module, couplings: Couplings) -> None:
        self.model = model
        self.is_seen = False
        """Whether a step was taken since, so that averages have changed."""
        self._is_stepped = False
        alike: dict[Any, list[str]] = defaultdict(list)
        for path, module in model.named_modules():
            if path and _has_values(module):
                alike[_structure(module)].append(path)
        used, self.suspects = couplings.used, dict[str, Suspect]()
        family = {path: paths for paths in alike.values() for path in paths if len(paths) > 1}
        for path in (
            path for path, _ in model.named_modules() if path in family
        ):  # what contains others, first
            if not any(path.startswith(f"{known}.") for known in self.suspects):
                self._suspect(path, family[path], used)

    def _suspect(self, path: str, alike: list[str], used: Set[str]) -> None:
        module = self.model.get_submodule(path)
        runs = _runs(path, used)
        if runs and any(p.requires_grad for p in module.parameters()):
            return  # a part of the model that is trained
        others = {other: self.model.get_submodule(other) for other in alike if _runs(other, used)}
        others = {other: found for other, found in others.items() if _are_apart(module, found)}
        equal = tuple(other for other, found in others.items() if _are_equal(module, found))
        is_layer = len([m for m in module.modules() if m._parameters]) == 1
        if others and (equal or not is_layer):
            is_equal = bool(equal) and _is_drawn(module)
            self.suspects[path] = Suspect(equal or tuple(others), is_equal, runs, _total(module))

    def note_gradients(self) -> None:
        """Let go of what gets gradients, a network of its own, of which others may be averages as well."""
        self._is_stepped = True
        trained = [path for path in self.suspects if any(p.grad is not None for p in self._parameters(path))]
        for path in trained:
            del self.suspects[path]
            own = _structure(self.model.get_submodule(path))
            for other, suspect in self.suspects.items():
                if not suspect.is_equal and _structure(self.model.get_submodule(other)) == own:
                    suspect.originals += (path,)

    def check(self) -> None:
        """See once, when the first step was taken, that it is clear what each average is one of.

        Raises:
            ValueError: it is not.
        """
        if self._is_stepped and not self.is_seen:
            self.averages()
            self.is_seen = True

    def averages(self) -> dict[str, str]:
        """Return the paths of the averages, and of what they are averages of.

        Raises:
            ValueError: an average may be one of several submodules, or runs with the model.
        """
        changed = {path: suspect for path, suspect in self.suspects.items() if self._has_changed(path)}
        for path, suspect in changed.items():
            if suspect.runs or len(suspect.originals) > 1:
                why = "runs in the same call" if suspect.runs else "may be an average of each of them"
                raise ValueError(
                    f"`{path}` is built as {listed(suspect.originals)} and changes without gradients, but {why}, so "
                    f"that it cannot follow when the model becomes smaller. {ADVICE}"
                )
        return {path: suspect.originals[0] for path, suspect in changed.items()}

    def staying(self, plan: Plan) -> dict[str, str]:
        """Return the copies that do not change, of what a plan cuts, with the reason why they stay whole.

        Raises:
            ValueError: no step was taken yet, so that nothing could have changed.
        """
        cut = {*plan.slices, *plan.attributes}
        found = {
            path: suspect.originals[0]
            for path, suspect in self.suspects.items()
            if suspect.is_equal and not self._has_changed(path)
            if any(name.startswith(f"{original}.") for original in suspect.originals for name in cut)
        }
        for path, original in found.items() if not self.is_seen else ():
            raise ValueError(
                f"`{path}` has the values of `{original}`, which becomes smaller before it shows whether that is an "
                f"average, which follows, or a teacher, which stays. {ADVICE}"
            )
        return {
            path: f"a copy of {original} that has not changed in training" for path, original in found.items()
        }

    def _parameters(self, path: str) -> list[nn.Parameter]:
        return list(self.model.get_submodule(path).parameters())

    def _has_changed(self, path: str) -> bool:
        return _total(self.model.get_submodule(path)) != self.suspects[path].total

    def state_dict(self) -> dict[str, Any]:
        """Return what is watched since when, safe under `weights_only=True`."""
        return {
            "is_seen": self.is_seen,
            "suspects": {path: dict(vars(s)) for path, s in self.suspects.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, of what is still there."""
        known = dict(self.model.named_modules())
        self.is_seen = bool(state["is_seen"])
        self.suspects = {path: Suspect(**own) for path, own in state["suspects"].items() if path in known}


def mirrored(plan: Plan, averages: Mapping[str, str]) -> Plan:
    """Return a plan that does to averages what it does to what they are averages of.

    Args:
        plan: of a model that holds them.
        averages: path of an average -> path of what it is one of.

    Example:
        >>> plan = Plan({"net.weight": {0: (0, 2)}}, {"net.weight": (3, 4), "ema.weight": (3, 4)})
        >>> mirrored(plan, {"ema": "net"}).slices["ema.weight"]
        {0: (0, 2)}
    """

    def moved(name: str) -> list[str]:
        """Return the names that a name has in the averages."""
        return [
            path + name[len(original) :]
            for path, original in averages.items()
            if name == original or name.startswith(f"{original}.")
        ]

    def with_averages(found: Mapping[str, Any]) -> dict[str, Any]:
        return {**found, **{other: value for name, value in found.items() for other in moved(name)}}

    return replace(
        plan,
        slices=with_averages(plan.slices),
        attributes=with_averages(plan.attributes),
        replaced=with_averages(plan.replaced),
        scales=(*plan.scales, *(replace(s, name=other) for s in plan.scales for other in moved(s.name))),
    )


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """Return what a copy of a module has in common with it: types of modules, names and shapes of tensors."""
    types = tuple((path, type(m)) for path, m in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return types, tuple((name, tuple(tensor.shape)) for name, tensor in tensors)


def _has_values(module: nn.Module) -> bool:
    """Whether a module has parameters, and all of them plain ones: not lazy, on meta, quantised or spread."""
    parameters = list(module.parameters())
    return bool(parameters) and all(type(p) is nn.Parameter and not p.is_meta for p in parameters)


def _runs(path: str, used: Set[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in used)


def _are_apart(one: nn.Module, other: nn.Module) -> bool:
    return not set(map(id, one.parameters())) & set(map(id, other.parameters()))


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def _is_drawn(module: nn.Module) -> bool:
    """Whether some of the values differ."""
    return any(bool((p != p.flatten()[:1]).any()) for p in module.parameters())


def _total(module: nn.Module) -> int:
    """Return the sum of the bits of all parameters, as integers: the same on every device."""
    flat = [p.detach().reshape(-1) for p in module.parameters()]
    bits = [values.view(INTEGERS.get(values.element_size(), torch.int64)) for values in flat]
    return sum(int(b.sum(dtype=torch.int64)) * (i + 1) for i, b in enumerate(bits))
