"""Modules without a weight that hand on their input, or zeros like it: what depth pruning leaves of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_prune.graph.plan import PLAIN, REPLACEMENT


class Skip(nn.Module):
    """Returns its input, as a residual block without its branches does, or zeros like it, as a branch that is gone.

    Args:
        replacement: as in `Plan.replaced`: "skip" or "zero"; a number after it says how long the tuple was that the
            module returned, of which all but the first entry become None; a name after a colon, which keyword
            argument is the input.
        replaced: the module whose place it takes. What an outer module may read of that one still answers, as
            `batch_first` of an attention does: its plain attributes, and a bias by None, as of a module without.

    Example:
        >>> Skip("skip")(torch.ones(1)), Skip("zero2:x")(x=torch.ones(1))
        (tensor([1.]), (tensor([0.]), None))
    """

    def __init__(self, replacement: str, replaced: nn.Module | None = None) -> None:
        super().__init__()
        found = REPLACEMENT.fullmatch(replacement)
        assert found is not None
        self.is_zero, self.num_outputs, self.argument = found[1] == "zero", int(found[2] or 0), found[3]
        for name, value in _answers(replaced).items() if replaced is not None else ():
            if not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand on the input, or zeros of its shape."""
        x = args[0] if args else kwargs[self.argument]
        y = torch.zeros_like(x) if self.is_zero else x
        return (y, *[None] * (self.num_outputs - 1)) if self.num_outputs else y


def _answers(module: nn.Module) -> dict[str, Any]:
    """Return what is safe to read of a module that is gone: plain values, also of its classes, and biases as None."""
    kinds = [kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    found = {name: value for kind in reversed(kinds) for name, value in vars(kind).items()} | vars(module)
    plain = {name: value for name, value in found.items() if not name.startswith("__") and _is_plain(value)}
    return plain | {
        name: None for name, value in module._parameters.items() if "bias" in name or value is None
    }


def _is_plain(value: object) -> bool:
    return all(isinstance(entry, PLAIN) for entry in (value if isinstance(value, tuple) else (value,)))
