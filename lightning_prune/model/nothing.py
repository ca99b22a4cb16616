"""What is said where coupled groups are asked for and there is none: only what concerns the question, and not much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_prune.core.granularities import Head
from lightning_prune.core.patterns import listed_reasons
from lightning_prune.model.contest import Contest
from lightning_prune.model.targets import computed_layers, said_of_computed

NEVER = {"kernel of a convolution", "vocabulary of an embedding"}  # no granularity prunes along those
USUAL = ("output of ", "input of the model or a constant")  # every model has them: they come last


def nothing_found(model: nn.Module, contest: Contest, dropped: Mapping[str, str]) -> str:
    """Say that a granularity finds no group, and why: of the weights that are pruned, and of what `exclude` keeps.

    Args:
        model: the whole model.
        contest: that nobody takes part in.
        dropped: the groups that could not follow, and why.
    """
    granularity, couplings = contest.granularity, contest.couplings
    found = f"`granularity` {granularity} finds nothing to prune in {type(model).__name__}."
    if isinstance(granularity, Head) and not _may_attend(op.name for op in couplings.record.ops):
        return f"{found} No attention runs in it, so it has no heads: Channel() prunes channels."
    spared = computed_layers(model, contest.scored, contest.recipe.exclude) if _is_open(contest) else []
    said = f" {said_of_computed(spared)}" if spared else ""
    if reasons := {**dropped, **_kept(contest), **_frozen(contest)}:
        return f"{found} Frozen are {listed_reasons(reasons)}.{said}"
    others = {name: group.role for name, group in couplings.groups.items()}
    return f"{found} It has {listed_reasons(others) if others else 'no coupled groups'}.{said}"


def _is_open(contest: Contest) -> bool:
    return contest.recipe.include is None


def _may_attend(operators: Iterable[str]) -> bool:
    return any("softmax" in name or "attention" in name for name in operators)


def _kept(contest: Contest) -> dict[str, str]:
    """Return the groups that could go, if not for what was asked for."""
    return {
        name: "`include` or `exclude` keeps it, or it is frozen"
        for name, group in contest.couplings.groups.items()
        if contest.granularity.prunes(group.role)
        and any(member.dim in contest.protected.get(member.tensor, ()) for member in group.members)
    }


def _frozen(contest: Contest) -> dict[str, str]:
    """Return why the dims of the weights that are pruned stay, "weight[dim]" -> reason, the usual ones last."""
    found = {}
    for place, reason in contest.couplings.frozen.items():
        tensor, dim = place[:-1].rsplit("[", 1)
        counts = contest.dims is None or int(dim) in contest.dims.get(tensor, ())
        if tensor in contest.scored and counts and reason not in NEVER:
            found[place] = reason
    return dict(
        sorted(found.items(), key=lambda entry: all(r.startswith(USUAL) for r in entry[1].split("; ")))
    )
