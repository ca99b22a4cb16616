"""A model and a recipe for coupled groups: what is chosen is masked, and in the end taken out for real."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.core.masks import PackedMask, pack, unpack
from lightning_prune.core.patterns import listed
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import Masks
from lightning_prune.graph import Plan, trace
from lightning_prune.graph.groups import Places
from lightning_prune.graph.plan_data import from_data, to_data
from lightning_prune.model.apply import Masked
from lightning_prune.model.averages import Verdict
from lightning_prune.model.calls import Call
from lightning_prune.model.group_choice import GroupChoice
from lightning_prune.model.mirroring import counterparts
from lightning_prune.model.prices import Counts
from lightning_prune.model.surgery import execute_


class GroupPruner(GroupChoice, Masked):
    """The masks of one model's coupled groups under one recipe, and the surgery that makes them real.

    It has the surface of `Pruner`; a mask covers all that a removed index reaches: weights, biases, scales of norms.
    `update_` and `apply_` change the model's weights, `shrink_` its shapes.

    Args:
        model, recipe, call, trained: as for `GroupChoice`, errors as well.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, call: Call, trained: Container[int] | None = None
    ) -> None:
        super().__init__(model, recipe, call, trained)
        self.masks: Masks = {}
        self.plans: list[Plan] = []
        self.known: dict[str, tuple[str, Places]] = {}
        """Role and places of the groups of a model that was cut, which go by the names that they had before."""
        self._is_proved = False

    def update_(self, fraction: float) -> None:
        """Choose anew, for a fraction of the final sparsity in [0, 1], and mask what is to go.

        What is pruned stays pruned, unless less than before is asked for.
        """
        self.choose_(fraction)
        if self.choice and not self._is_proved:
            self._prove(fraction)
        self.mask_()

    def mask_(self) -> None:
        """Mask what the present choice removes."""
        self.masks = self._masks()
        with self.copies.masking():
            self.apply_()

    def forget(self) -> None:
        """Let all indices compete anew at the next update, those that are masked by now among them."""
        self.choice, self.masks = {}, {}

    @property
    def awaited(self) -> dict[str, str]:
        """The copies that further training will show to be averages, or not to be, of what is pruned."""
        return {
            path: original
            for path, original in self.copies.open.items()
            if any(name in self.targets for name in counterparts(self.model, {path: original}).values())
        }

    def _prove(self, fraction: float) -> None:
        """Find out what cannot follow before anything is masked, by the choice that would be made in the end."""
        self.fraction = 1.0
        try:
            self._choose()
            self.plan()
        finally:
            self.fraction = fraction
        self._choose()
        self._is_proved = True

    def _masks(self) -> Masks:
        found = self.couplings.masks(self.choice)
        return {n: found[n].contiguous().to(p.device) for n, p in self.targets.items() if n in found}

    def shrink_(self, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()) -> Plan:
        """Make the model as small as its masks say, and go on with the smaller one."""
        plan = self.plan()
        if plan.is_empty:
            self.masks = self._masks()
            return plan
        plan = self.copies.joined(plan)
        self.count_copies_()
        spent, left = self.contest.cost(self.choice), self.contest.counts(self.choice)
        self.known = self.couplings.left({name: kept for name, (_, kept) in plan.groups.items()})
        with self.copies.masking():
            execute_(self.model, plan, optimizers=optimizers, copies=copies)
        self.statistics.cut_(self.model, plan.slices)
        self.plans.append(plan)
        self.choice, self.masks = {}, {}
        self._trace_again(spent, left)
        return plan

    def follow_(self, plan: Plan) -> None:
        """Go on with the smaller model once someone else has carried out a plan; masks and sums are cut alike."""
        if not plan.slices:
            return  # blocks that went as wholes: what is masked stays in place
        kept = self.couplings.kept_of(plan.slices)
        spent = self.contest.cost({name: kept[name] for name in self.couplings.groups})
        counts = {name: int(mask.sum()) for name, mask in kept.items()}
        self.known = self.couplings.left(counts)
        self.choice = {name: mask[kept[name].to(mask.device)] for name, mask in self.choice.items()}
        if plan.slices.keys() & self.statistics.targets.keys():
            self.statistics.cut_(self.model, plan.slices)
        self.plans.append(Plan({}, {}, groups={n: (len(mask), counts[n]) for n, mask in kept.items()}))
        self._trace_again(spent, self.contest.left | counts)
        self.choice = {name: mask for name, mask in self.choice.items() if name in self.contest.groups}
        self.masks = self._masks()

    def _trace_again(self, spent: float, left: Counts) -> None:
        """See the smaller model's groups, by the names that they had, and let them compete from now on."""
        self.couplings = trace(
            self.call.module,
            self.call.args,
            self.call.kwargs,
            root=self.model,
            training=self.call.is_training,
        )
        self.couplings.recognise(self.known)
        self.count_copies_(Verdict.OPEN)
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self.scored = {name: shapes[name] for name in self.scored if name in shapes}  # not if it was deleted
        self.contest.follow(self.couplings, spent, self.scored, left)
        self._refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return the choice (packed), what was cut, progress and sums, safe under `weights_only=True`."""
        return {
            "choice": {name: pack(mask) for name, mask in self.choice.items()},
            "fraction": self.fraction,
            "is_proved": self._is_proved,
            "frozen": dict(self.frozen),
            "contest": self.contest.state_dict(),
            "plans": to_data(self.plans),
            "known": dict(self.known),
            "outputs": dict(self.outputs),
            "statistics": self.statistics.state_dict(),
            "copies": self.copies.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or leave all as it is.

        Raises:
            ValueError: the choice belongs to other groups.
        """
        packed: Mapping[str, PackedMask] = state["choice"]
        choice = {name: unpack(name, mask) for name, mask in packed.items()}
        groups: Mapping[str, Any] = self.contest.groups
        if known := state.get("known", {}):
            self.couplings.recognise(known)
            groups = self.couplings.groups
        wrong = [
            name for name, mask in choice.items() if name not in groups or len(mask) != groups[name].size
        ]
        if wrong:
            raise ValueError(
                f"`choice` of the checkpoint belongs to the groups {listed(groups)}, but got some for "
                f"{listed(wrong)}: the model, `include` or `exclude` has changed."
            )
        self.plans, self.choice = list(from_data(state["plans"])), choice
        self.known, self.outputs = dict(known), dict(state.get("outputs", self.outputs))
        for name, reason in state["frozen"].items():
            self._drop([name], reason)
        cut = {n: size for plan in reversed(self.plans) for n, (size, _) in plan.groups.items()}
        self.contest.load_state_dict(state["contest"], cut)
        self._refresh()
        self._is_proved = bool(state["is_proved"])
        self.masks, self.fraction = self._masks(), float(state["fraction"])
        self.statistics.load_state_dict(state["statistics"])
        self.copies.load_state_dict(state.get("copies"))
