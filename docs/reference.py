"""The pages of the API, one for each family of public names; a name without a page or a docstring is an error."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning_prune
from lightning_prune import config

FAMILIES: dict[str, tuple[str, str]] = {
    "callbacks": ("Callbacks", "When to prune: each goes into `Trainer(callbacks=[...])`."),
    "functions": ("Functions", "The same without a Trainer, and what loads, measures and plans."),
    "schedule": ("Schedules", "Along which curve: progress through the window to a fraction of the target."),
    "criterion": ("Criteria", "How good is each weight? Higher scores are kept."),
    "granularity": ("Granularities", "What goes as one piece."),
    "scope": ("Scopes", "Who competes with whom."),
    "masking": ("Masking", "What becomes of pruned weights while masks may still change."),
    "regularizer": ("Regularizers", "What drives groups towards zero before they go."),
    "solver": ("Solvers", "How the weights that stay make up for those that go."),
    "window": ("Window", "When masks are updated."),
    "budget": ("Budget", "What a smaller model may cost, in place of a sparsity."),
}
MEMBERS = {
    "PostTrainingPruning": "run",
    "Plan": "is_empty, shape_after, differences",
    "ReplaysRecord": "",
}
"""Which members of a class are shown beside its own docstring."""


def family_of(name: str) -> str:
    """Return the family of a public name: an axis of the configuration, "callbacks" or "functions".

    Raises:
        ValueError: the name has no docstring.
    """
    member = getattr(lightning_prune, name)
    if not (member.__doc__ or "").strip():
        raise ValueError(f"{name} is public, but has no docstring.")
    for axis in config.AXES:
        if name in config.nouns(axis):
            return axis
    is_callback = inspect.isclass(member) and member.__module__.startswith("lightning_prune.callbacks.")
    return "callbacks" if is_callback else "functions"


def names_by_family() -> dict[str, list[str]]:
    """Return all public names, each in its family, as they are listed on the pages."""
    found: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in lightning_prune.__all__:
        found.setdefault(family_of(name), []).append(name)
    return found


def heading_of(family: str) -> tuple[str, str]:
    """Return a family's title and what it is; an axis that is new has the plainest ones until somebody writes them."""
    return FAMILIES.get(family, (family.capitalize(), f"What `{family}=` may be."))


def entry(name: str) -> str:
    """Return the part of a page that documents a name."""
    kind = "autoclass" if inspect.isclass(getattr(lightning_prune, name)) else "autofunction"
    members = MEMBERS.get(name)
    options = [f"   :members: {members}"] if members else []
    return "\n".join(
        [f"## {name}\n", "```{eval-rst}", f".. {kind}:: lightning_prune.{name}", *options, "```"]
    )


def pages() -> dict[str, str]:
    """Return the pages of the reference: file name -> Markdown."""
    found = {}
    for family, names in names_by_family().items():
        title, line = heading_of(family)
        found[f"{family}.md"] = "\n\n".join([f"# {title}", line, *map(entry, names)]) + "\n"
    return found
