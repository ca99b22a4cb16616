"""Ground floor: pure functions of tensors. Imports torch and nothing else.

The nouns (schedules, windows, criteria, granularities, scopes) hold plain settings and check them when they
are built; importing them does not import torch, so that a command line can refuse a bad value at once. What
computes on tensors is loaded when it is first called: scopes say `core.keep_top(...)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.core.across import num_kept_of as num_kept_of
    from lightning_prune.core.selection import keep_top as keep_top
    from lightning_prune.core.selection import keep_top_rows as keep_top_rows

_LAZY = {"keep_top": "selection", "keep_top_rows": "selection", "num_kept_of": "across"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lightning_prune.core.{_LAZY[name]}"), name)
