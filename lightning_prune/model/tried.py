"""Something that a smaller model is for, tried before any model is smaller: which groups would make it fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lightning_prune.graph import Choice, Couplings, Plan, Unsolvable
from lightning_prune.graph.replay import as_if
from lightning_prune.graph.sandbox import untouched
from lightning_prune.model.equivalence import num_until
from lightning_prune.model.surgery import sliced


def first_unfit(
    couplings: Couplings,
    choice: Choice,
    run: Callable[[], object],
    agree: Callable[[str], str] = lambda found: found,
    *,
    is_known: bool = False,
) -> tuple[str, str] | None:
    """Return a group with which something fails once it is as small as a choice makes it, and the error; None if none.

    The model is as it was afterwards. What fails with the whole model tells nothing.

    Args:
        couplings: of the model.
        choice: what is kept of each group.
        run: reads the model's parameters by their places.
        agree: what one process has found -> what all go by, as they try the same; "" is no error.
        is_known: whether it is known to run with the whole model.
    """
    choice = _solvable(couplings, choice)

    def error_with(some: Sequence[str]) -> str:
        return agree(_error(couplings, _solvable(couplings, {name: choice[name] for name in some}), run))

    names = list(choice)
    if not names or (not is_known and error_with([])) or not (error := error_with(names)):
        return None
    errors = {len(names): error}

    def is_fit(some: Sequence[str]) -> bool:
        if found := error_with(some):
            errors[len(some)] = found
        return not found

    place = num_until(names, is_fit)
    return names[place - 1], errors[place]


def _solvable(couplings: Couplings, choice: Choice) -> Choice:
    """Leave out groups that cannot follow together: that is found out elsewhere."""
    while choice:
        try:
            couplings.plan(choice)
        except Unsolvable as unsolvable:
            left = {name: mask for name, mask in choice.items() if name not in unsolvable.groups}
            choice = left if len(left) < len(choice) else {}
        else:
            return choice
    return {}


def _error(couplings: Couplings, choice: Choice, run: Callable[[], object]) -> str:
    plan = couplings.plan(choice) if choice else Plan({}, {})
    own = {name: tensor for name, (tensor, _) in couplings.record.tensors.items() if name in plan.slices}
    placed = {id(tensor): _small(tensor, plan, name) for name, tensor in own.items()}
    try:
        with (
            untouched(couplings.run.root),
            as_if(couplings.run.paths, placed, plan.attributes),
            torch.enable_grad(),
        ):
            run()
    except Exception as error:  # whatever a user's code raises at sizes that it does not expect
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def _small(tensor: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    small = sliced(tensor.detach(), plan.slices[name])
    return nn.Parameter(small, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small
