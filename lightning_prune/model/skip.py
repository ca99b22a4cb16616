"""Blocks that hand on their input: what depth pruning leaves of a residual block."""

from __future__ import annotations

from typing import Any

from torch import nn


class Skip(nn.Module):
    """Returns its first argument, as a residual block without its branches does.

    Args:
        num_outputs: None where the block returned a tensor; else how long the tuple was that it returned, of which all
            but the first entry become None.

    Example:
        >>> import torch
        >>> Skip(None)(torch.ones(1)), Skip(2)(torch.ones(1))
        (tensor([1.]), (tensor([1.]), None))
    """

    def __init__(self, num_outputs: int | None) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        """Hand on `x`."""
        return x if self.num_outputs is None else (x, *[None] * (self.num_outputs - 1))
