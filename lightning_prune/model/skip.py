"""Modules without a weight that hand on their input, or zeros like it: what depth pruning leaves of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_prune.graph.plan import REPLACEMENT


class Skip(nn.Module):
    """Returns its input, as a residual block without its branches does, or zeros like it, as a branch that is gone.

    Args:
        replacement: as in `Plan.replaced`: "skip" or "zero"; a number after it says how long the tuple was that the
            module returned, of which all but the first entry become None; a name after a colon, which keyword
            argument is the input.

    Example:
        >>> Skip("skip")(torch.ones(1)), Skip("zero2:x")(x=torch.ones(1))
        (tensor([1.]), (tensor([0.]), None))
    """

    def __init__(self, replacement: str) -> None:
        super().__init__()
        found = REPLACEMENT.fullmatch(replacement)
        assert found is not None
        self.is_zero, self.num_outputs, self.argument = found[1] == "zero", int(found[2] or 0), found[3]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand on the input, or zeros of its shape."""
        x = args[0] if args else kwargs[self.argument]
        y = torch.zeros_like(x) if self.is_zero else x
        return (y, *[None] * (self.num_outputs - 1)) if self.num_outputs else y
