"""Plans that are mirrored on copies within the model: what becomes of the original, becomes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_prune.graph import Plan


def counterparts(model: nn.Module, copies: Mapping[str, str]) -> dict[str, str]:
    """Return the name that each tensor and each module of a copy has in its original.

    Names are those of the model, by which a tensor that several modules share has one. A copy that holds a copy itself
    has all of it from the innermost original.

    Args:
        model: holds them.
        copies: path of a copy -> path of its original, which is built alike.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.Linear(1, 2))
        >>> counterparts(model, {"1": "0"})
        {'1.weight': '0.weight', '1.bias': '0.bias', '1': '0'}
    """
    names = {id(part): name for name, part in _parts(model)}
    found: dict[str, str] = {}
    for path, original in copies.items():
        one, other = model.get_submodule(path), model.get_submodule(original)
        for (_, own), (_, its) in zip(_parts(one), _parts(other), strict=True):
            if own is not its:
                found[names[id(own)]] = names[id(its)]
    return {name: _innermost(found, name) for name in found}


def mirrored(plan: Plan, names: Mapping[str, str]) -> Plan:
    """Return a plan that does to copies what it does to their originals.

    Args:
        plan: of the model that holds them.
        names: as `counterparts` returns them.

    Example:
        >>> plan = Plan({"net.weight": {0: (0, 2)}}, {"net.weight": (3, 4), "ema.weight": (3, 4)})
        >>> mirrored(plan, {"ema.weight": "net.weight"}).slices["ema.weight"]
        {0: (0, 2)}
    """
    copies = defaultdict(list)
    for name, original in names.items():
        copies[original].append(name)

    def with_copies(found: Mapping[str, Any]) -> dict[str, Any]:
        return {**found, **{other: value for name, value in found.items() for other in copies[name]}}

    return replace(
        plan,
        slices=with_copies(plan.slices),
        attributes=with_copies(plan.attributes),
        replaced=with_copies(plan.replaced),
        scales=(*plan.scales, *(replace(s, name=other) for s in plan.scales for other in copies[s.name])),
    )


def _innermost(originals: Mapping[str, str], name: str) -> str:
    """Follow copies of copies; what would lead back to itself is followed once around at most."""
    for _ in originals:
        name = originals.get(name, name)
    return name


def _parts(module: nn.Module) -> list[tuple[str, Tensor | nn.Module]]:
    return [*module.named_parameters(), *module.named_buffers(), *module.named_modules()]
