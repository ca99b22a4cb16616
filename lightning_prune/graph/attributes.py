"""Integers that modules hold: while a model is traced they remember which attribute they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_prune.graph.integers import Attribute, TracedInt, traced_sqrt

NOT_SIZES = {"training", "padding_idx", "stride", "padding", "dilation", "kernel_size", "output_padding"}


@contextmanager
def traced_integers(paths: Mapping[nn.Module, str]) -> Iterator[None]:
    """Let integer attributes of modules remember that they are that."""
    with ExitStack() as stack:
        for module, path in paths.items():
            for name, value in list(vars(module).items()):
                if not name.startswith("_") and name not in NOT_SIZES:
                    vars(module)[name] = _traced_attribute(path, name, value)
                    stack.callback(vars(module).__setitem__, name, value)
        stack.callback(setattr, math, "sqrt", math.sqrt)
        math.sqrt = traced_sqrt  # type: ignore[assignment]
        yield


def _traced_attribute(path: str, name: str, value: Any) -> Any:
    if type(value) is int and value > 1:
        return TracedInt(value, Attribute(path, name, None, value))
    if type(value) in (tuple, list) and 0 < len(value) <= 8 and all(type(entry) is int for entry in value):
        entries = (TracedInt(n, Attribute(path, name, i, n)) if n > 1 else n for i, n in enumerate(value))
        return type(value)(entries)
    return value
