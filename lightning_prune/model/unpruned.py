"""What stays as it is without anyone having asked for that, in words."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import nn

from lightning_prune.core.patterns import matches
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import Name
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.joint_calls import not_called
from lightning_prune.model.targets import Pattern, computed_layers


def layers_left_out(module: nn.Module, recipe: Recipe, targets: Container[Name]) -> Iterator[str]:
    """Name layers that one would take for pruned, where nobody has asked for them or against them."""
    if recipe.include is None:
        for path in computed_layers(module, targets, recipe.exclude):
            yield (
                f"`{path}` is not pruned: its weight is computed from others, by weight_norm or a parametrization. "
                "Remove that, or name what it is computed from in `include`."
            )


def modules_not_run(pruner: object) -> Iterator[str]:
    """Name modules that are trained, and of which nobody knows whether they will fit a smaller model."""
    if not isinstance(pruner, GroupPruner):
        return
    patterns = pruner.recipe.exclude
    spared = [p for p, m in pruner.model.named_modules() if p and any(_names(x, p, m) for x in patterns)]
    for path in not_called(pruner.model, pruner.couplings.used, (*pruner.copies.suspects, *spared)):
        yield (
            f"`{path}` is trained, but no part of the call that shows what is coupled: it stays as it is, and fails if "
            "it reads what becomes smaller. Name it in `exclude` if it does not, or else what it reads."
        )


def _names(pattern: Pattern, path: str, module: nn.Module) -> bool:
    return matches(pattern, path) if isinstance(pattern, str) else isinstance(module, pattern)
