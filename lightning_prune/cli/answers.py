"""What the command line says of an error: a message where a setting is to blame, a traceback where the code is."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from types import TracebackType

from hydra.errors import CompactHydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.core.checks import did_you_mean

CHECKED = ("lightning_prune", "hydra", "lightning")
"""Packages whose ValueErrors are answers to settings."""
CHOOSES = ("pruning=", "experiment=")
"""What chooses a recipe on the command line."""
MISCONFIGURED = "MisconfigurationException"
"""What Lightning raises for settings of the Trainer; by its name, since Lightning is not imported for a message."""


def answer(error: BaseException) -> str | None:
    """Return what there is to say of an error that a setting is to blame for; None for any other.

    Example:
        >>> from lightning_prune.core.checks import check_count
        >>> try:
        ...     check_count("seed", -1, minimum=0)
        ... except ValueError as error:
        ...     print(answer(error))
        `seed` is a whole number of at least 0, but got -1.
        >>> answer(ZeroDivisionError("in somebody's code")) is None
        True
    """
    if isinstance(error, CompactHydraException):
        return explained(error)
    if isinstance(error, OmegaConfBaseException):
        return str(error).strip()
    is_checked = isinstance(error, ValueError) and _raised_in(error.__traceback__).split(".")[0] in CHECKED
    if not (is_checked or type(error).__name__ == MISCONFIGURED):
        return None
    said = str(error).strip()
    if "Config group override" in said:  # Hydra's own words, which do not name the group
        names = [argument.partition("=")[0] for argument in sys.argv[1:] if argument.endswith("=null")]
        tildes = [f"~{name.lstrip('+~')}" for name in names]
        said += f" To leave a group out, write {' '.join(tildes) or '~group'}."
    return said


def explained(error: CompactHydraException) -> str:
    """Return the message of an error, and for an unknown key or choice the known ones."""
    if isinstance(error, MissingConfigException) and error.options:
        first_line, wanted = str(error).partition("\n")[0], str(error.missing_cfg_file).rpartition("/")[2]
        return f"{first_line}. The choices are {error.options}.{did_you_mean(wanted, error.options)}"
    cause = error.__cause__
    if (said := without_recipe(str(error), sys.argv[1:])) is not None:
        return said
    if not isinstance(cause, OmegaConfBaseException):
        return str(error).strip()
    node, known = cause.parent_node, list[str]()
    if isinstance(node, DictConfig):
        known = [str(key) for key in node if not str(key).startswith("_")]
    is_unknown = bool(known) and cause.key not in known
    neighbours = f"\nThe keys there are {known}.{did_you_mean(str(cause.key), known)}" if is_unknown else ""
    return f"{str(error).strip()}\n{str(cause).strip()}{neighbours}"


def without_recipe(said: str, words: Sequence[str]) -> str | None:
    """Return what to say of a setting of pruning where no recipe is chosen; None where one is.

    Args:
        said: Hydra's own message.
        words: of the command line.

    Example:
        >>> without_recipe("Could not override 'pruning.sparsity'.", ["pruning.sparsity=0.9"])
        '`pruning.sparsity` is a setting of a recipe, but none is chosen: add pruning=gradual, or another one (--help).'
        >>> without_recipe("Could not override 'pruning.sparsty'.", ["pruning=erk", "pruning.sparsty=0.9"]) is None
        True
    """
    found = re.match(r"Could not override '(pruning[./][\w./]+)'", said)
    chosen = [word.partition("=")[2] for word in words if word.lstrip("+").startswith(CHOOSES)]
    if found is None or any(choice not in ("none", "null") for choice in chosen):
        return None
    return f"`{found[1]}` is a setting of a recipe, but none is chosen: add pruning=gradual, or another one (--help)."


def _raised_in(trace: TracebackType | None) -> str:
    """Return the module whose code raised an error."""
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", ""))
