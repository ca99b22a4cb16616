"""What LightningCLI has to be told of the nouns, so that a configuration can name them by `class_path`."""

from __future__ import annotations

import dataclasses
import sys
from importlib.util import find_spec
from typing import Any

from lightning_prune import nouns
from lightning_prune.core.types import Scope


def teach_jsonargparse() -> None:
    """Let jsonargparse, where it is installed, take nouns for classes to choose from, defaults among them.

    By itself it takes a dataclass for a group of settings without a class, so that `schedule: Schedule = Polynomial()`
    has a default that is no schedule, and no callback that has it can be parsed.
    """
    if find_spec("jsonargparse") is None:
        return
    from jsonargparse import set_parsing_settings

    # scopes name types of tensors that their modules do not import, for want of torch: any will do
    Scope.__call__.__annotations__ = {"scores": Any, "sparsity": float, "return": Any}
    members: list[type] = [getattr(sys.modules["lightning_prune"], name) for name in nouns()]
    set_parsing_settings(subclasses_enabled=[noun for noun in members if dataclasses.is_dataclass(noun)])
