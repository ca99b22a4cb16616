"""Submodules that may be averages of others, by how they are built, by their values, and by what runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from torch import nn

from lightning_prune.core.patterns import matches
from lightning_prune.model.lookalikes import (
    are_apart,
    are_equal,
    are_near,
    families,
    is_averaged,
    is_drawn,
    is_layer,
)


@dataclass
class Suspect:
    """A submodule that may be an average of another one.

    Args:
        originals: paths of what it may be an average of: of its values or near to them, or else all of its structure.
        is_alike: whether it had values of an original, or near ones, and not the ones and zeros that norms begin with.
        is_certain: whether it is an average by its type, or was said to be one.
        is_spared: whether `exclude` names it.
        is_used: whether a step of training runs it beside the model, as far as is known.
        runs: whether it runs in the traced call, as a part of the model.
        total: of the bits of its parameters, when the watch began.
        has_changed: whether they were seen to be others since.
    """

    originals: tuple[str, ...]
    is_alike: bool
    is_certain: bool
    is_spared: bool
    is_used: bool
    runs: bool
    total: int = 0
    has_changed: bool = False

    @property
    def is_clear(self) -> bool:
        """Whether it is clear what it would be an average of."""
        return not self.runs and len(self.originals) == 1


def find_suspects(
    model: nn.Module, used: Set[str], ran: Set[nn.Module] | None, exclude: Iterable[object]
) -> dict[str, Suspect]:
    """Return what may be an average, by path, and nothing of what is within one.

    Args:
        model: as it is now.
        used: names of the tensors that the traced call reads.
        ran: modules that ran in the step that the call is a part of; None where no step was seen.
        exclude: patterns of what is left out; module types among them name no submodule.
    """
    patterns = [pattern for pattern in exclude if isinstance(pattern, str)]
    found: dict[str, Suspect] = {}
    for path, family in families(model).items():
        if any(path.startswith(f"{known}.") for known in found):
            continue
        module, runs = model.get_submodule(path), _runs(path, used)
        if runs and _is_trained(module):
            continue  # a part of the model
        others = [other for other in family if _runs(other, used)]
        if runs:  # averages of what is trained, unlike the layers of a model that is frozen
            others = [other for other in others if _is_trained(model.get_submodule(other))]
        if suspect := _compared(model, path, others, runs):
            suspect.is_spared = _are_all_named(path, module, patterns)
            suspect.is_used = ran is None or not ran.isdisjoint(module.modules())
            found[path] = suspect
    return found


def _compared(model: nn.Module, path: str, others: Sequence[str], runs: bool) -> Suspect | None:
    """Return what the comparison with submodules tells that are built alike and run.

    Of what runs itself, as the layers of a frozen model do, only equal values tell anything.
    """
    module = model.get_submodule(path)
    apart = {o: other for o in others if are_apart(module, other := model.get_submodule(o))}
    near = [o for o, other in apart.items() if are_equal(module, other)]
    near = near or [o for o, other in apart.items() if not runs and are_near(module, other)]
    averaged = [o for o in apart if is_averaged(model, o) != is_averaged(model, path)]
    if not apart or (is_layer(module) and not near and not averaged):
        return None
    return Suspect(
        originals=tuple(near or averaged or apart),
        is_alike=bool(near) and is_drawn(module),
        is_certain=bool(averaged),
        is_spared=False,
        is_used=True,
        runs=runs,
    )


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _runs(path: str, used: Set[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in used)


def _are_all_named(path: str, module: nn.Module, patterns: Sequence[str]) -> bool:
    names = [f"{path}.{name}" for name, _ in module.named_parameters()]
    return all(any(matches(pattern, name) for pattern in patterns) for name in names)
