"""What stays as it is without anyone having asked for that, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lightning_prune.core.patterns import listed, matches
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import Name
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.joint_calls import not_called
from lightning_prune.model.targets import FROZEN, Pattern, computed_layers, reasons_left_out

MANY = 0.1
"""The share of all weights from which on those are named that nobody expects to be left out, as recurrent ones.

Of frozen ones and embeddings one does: they are named where they are the most.
"""
NUM_NAMED = 3


def layers_left_out(module: nn.Module, recipe: Recipe, targets: Mapping[Name, Tensor]) -> Iterator[str]:
    """Name layers that one would take for pruned, where nobody has asked for them or against them."""
    if recipe.include is not None:
        return
    computed = computed_layers(module, targets, recipe.exclude)
    for path in computed:
        yield (
            f"`{path}` is not pruned: its weight is computed from others, by weight_norm or a parametrization. "
            "Remove that, or, but for weight_norm, name what it is computed from in `include`."
        )
    yield from _shares_left_out(module, recipe, targets, computed)


def _shares_left_out(
    module: nn.Module, recipe: Recipe, targets: Mapping[Name, Tensor], computed: Sequence[str]
) -> Iterator[str]:
    """Say how little is pruned, where much is left out that the sparsity does not count."""
    reasons = reasons_left_out(module, exclude=recipe.exclude, trained={id(t) for t in targets.values()})
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    total, left = sum(sizes[name] for name in {*targets, *reasons}), dict[tuple[str, str], int]()
    for name, reason in reasons.items():
        if not reason.startswith("`exclude`") and not any(name.startswith(f"{path}.") for path in computed):
            path = name.partition(".")[0] if reason == FROZEN else name.rpartition(".")[0] or name
            left[path, reason] = left.get((path, reason), 0) + sizes[name]
    is_expected = {reason: reason == FROZEN or reason.startswith("Embedding") for _, reason in left}
    surprising = sum(size for (_, reason), size in left.items() if not is_expected[reason])
    if surprising <= MANY * total and sum(left.values()) <= total / 2:
        return
    largest = sorted(left.items(), key=lambda entry: -entry[1])
    named = [f"`{path}` ({size / total:.0%}: {reason})" for (path, reason), size in largest]
    yield (
        f"{sum(sizes[name] for name in targets) / total:.0%} of the weights are pruned, and sparsities are of those. "
        f"Left out are {listed(named, num_shown=NUM_NAMED)}."
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
