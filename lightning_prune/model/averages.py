"""Submodules that are averages of others, or are compared with them weight by weight: they are cut alike.

A moving average of weights, or a target network, is built as what it follows, gets no gradient, and changes all the
same. A teacher does not change, and a second network gets gradients. Where nothing has changed, torch's `AveragedModel`
is an average for certain; and what has the values of another one, or nearly, while no step runs it, can only be
compared with it or take its values, and has to be of its shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any

from torch import nn

from lightning_prune.core.patterns import listed
from lightning_prune.graph import Couplings, Plan
from lightning_prune.model.lookalikes import structure, total
from lightning_prune.model.mirroring import counterparts, mirrored
from lightning_prune.model.suspects import Suspect, find_suspects

ADVICE = (
    "Average by torch's AveragedModel or Lightning's WeightAveraging, or distil by Distillation, which keeps its copy "
    "outside of the module; name in `exclude` what is to stay as it is; or set shrink='never'."
)
HOW = (
    "An average becomes smaller too as torch's AveragedModel, or in `copies` of `shrink`; name in `exclude` what is to "
    "stay as it is. Until then a budget counts it as a part that stays."
)


class Verdict(Enum):
    """What becomes of a submodule when what it may be an average of becomes smaller."""

    FOLLOWS = "it becomes smaller as well"
    STAYS = "it stays whole, and that is said"
    OPEN = "further training will show it"
    APART = "it has nothing to do with that"


class Copies:
    """The submodules of a model that may be averages of others.

    Args:
        model: as it is now.
        couplings: of a call of it.
        ran: the modules that ran in the step that the call is a part of; None where no step was seen.
        exclude: patterns of what is left out.
    """

    def __init__(
        self,
        model: nn.Module,
        couplings: Couplings,
        ran: Set[nn.Module] | None = None,
        exclude: Iterable[object] = (),
    ) -> None:
        self.model = model
        self.is_watched = self.trains_on = self.is_seen = False
        """Whether changes are watched; go on once the model is smaller; and a step was taken, so that there are any."""
        self._is_stepped = False
        self.notes: list[str] = []
        """What is to be said of the last plan."""
        self.agree: Callable[[Any], Any] = lambda found: found
        """What one process has found -> what all go by; each is asked at the same points."""
        self._hooks = ExitStack()
        self.suspects = find_suspects(model, couplings.used, ran, exclude)

    def watch(self, *, trains_on: bool) -> None:
        """See from now on what changes.

        Args:
            trains_on: whether training goes on once the model has become smaller, so that averages have to follow.
        """
        self.is_watched, self.trains_on = True, trains_on
        for path, suspect in self.suspects.items():
            suspect.total = total(self.model.get_submodule(path))
        self._note_uses()

    def _note_uses(self) -> None:
        """See from now on which suspects run, whoever calls them."""
        self._hooks.close()
        for path, module in self._present().items():

            def note(*_: Any, suspect: Suspect = self.suspects[path]) -> None:
                suspect.is_used = True

            for part in module.modules():
                self._hooks.callback(part.register_forward_pre_hook(note).remove)

    def close(self) -> None:
        """Leave no hook behind."""
        self._hooks.close()

    def declare(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Take submodules for averages, of which nothing else tells that they are, and return the other modules.

        Raises:
            ValueError: it is not clear what one of them is an average of.
        """
        paths = {module: path for path, module in self.model.named_modules()}
        given = list(modules)
        for path in (paths[module] for module in given if module in paths):
            known = [s for p, s in self.suspects.items() if p == path or p.startswith(f"{path}.")]
            if not known or not all(suspect.is_clear for suspect in known):
                originals = list(dict.fromkeys(o for suspect in known for o in suspect.originals))
                raise ValueError(
                    f"`copies` within the model are built as one other submodule of it that the call runs, but got "
                    f"`{path}`, which is built as {listed(originals) or 'none'}."
                )
            for suspect in known:
                suspect.is_certain = True
        return [module for module in given if module not in paths]

    def note_gradients(self) -> None:
        """Let go of what gets gradients, a network of its own, of which others may be averages as well."""
        self._is_stepped = True
        for path, module in self._present().items() if self.suspects else ():
            if any(p.grad is not None for p in module.parameters()):
                del self.suspects[path]
                for other, found in self._present().items():
                    if not self.suspects[other].is_alike and structure(found) == structure(module):
                        self.suspects[other].originals += (path,)

    @contextmanager
    def masking(self) -> Iterator[None]:
        """Let masks be applied, which are no change that tells of an average; only what runs is reached by them."""
        self._see_changes()
        yield
        for path, module in self._present().items() if self.is_watched else ():
            if self.suspects[path].runs:
                self.suspects[path].total = total(module)

    def check(self) -> bool:
        """See, when the first step was taken, that it is clear what each average is one of, and return that once.

        Raises:
            ValueError: it is not.
        """
        if not self.trains_on or self.is_seen or not self._is_stepped:
            return False
        self.averages()
        self.is_seen = True
        return True

    def averages(self) -> dict[str, str]:
        """Return the paths of the averages, and of what they are averages of.

        Raises:
            ValueError: an average of a model that is trained on may be one of several submodules, or runs with it.
        """
        return self._originals(self._verdicts(), Verdict.FOLLOWS)

    @property
    def open(self) -> dict[str, str]:
        """The paths of what further training will show to be averages, or not to be, and of their originals."""
        return self._originals(self._verdicts(), Verdict.OPEN)

    def names(self, *also: Verdict) -> dict[str, str]:
        """Return the name of each tensor and module that follows another, and the name of that one.

        Args:
            also: what is counted among those that follow.
        """
        return counterparts(self.model, self._originals(self._verdicts(), Verdict.FOLLOWS, *also))

    def joined(self, plan: Plan) -> Plan:
        """Return a plan that does to averages what it does to what they are averages of; `notes` say what is unsure.

        Raises:
            ValueError: no step was taken yet that would show what follows, and training goes on.
        """
        self.notes, verdicts = [], self._verdicts()
        for path, original in self._originals(verdicts, Verdict.FOLLOWS, Verdict.STAYS, Verdict.OPEN).items():
            verdict = verdicts[path]
            is_cut = mirrored(plan, counterparts(self.model, {path: original})) != plan
            if is_cut and verdict is Verdict.OPEN and not self.is_seen:
                raise ValueError(
                    f"`{path}` has the values of `{original}`, or nearly, which becomes smaller before it shows "
                    f"whether that is an average, which follows, or a teacher, which stays. {ADVICE}"
                )
            if is_cut and (note := self._note(path, self.suspects[path], verdict)):
                self.notes.append(note)
        return mirrored(plan, counterparts(self.model, self._originals(verdicts, Verdict.FOLLOWS)))

    def _note(self, path: str, suspect: Suspect, verdict: Verdict) -> str | None:
        if verdict in (Verdict.OPEN, Verdict.STAYS):
            return f"`{path}` stays whole: {self._why(suspect)}"
        if suspect.is_certain or suspect.has_changed:
            return None
        return (
            f"`{path}` becomes smaller with `{suspect.originals[0]}`, whose values it had, or nearly: no step so "
            "far has run it, so that it is taken for an average that is yet to change. Name it in `exclude` if it is "
            "to stay whole."
        )

    def _why(self, suspect: Suspect) -> str:
        if len(suspect.originals) > 1:
            return f"it may be an average of each of {listed(suspect.originals)}."
        if self.is_watched:
            return f"a copy of {suspect.originals[0]} that has not changed in training."
        return f"it may be an average of {suspect.originals[0]}, or a teacher that was built as it. {HOW}"

    def _verdicts(self) -> dict[str, Verdict]:
        self._see_changes()
        built = {path: structure(module) for path, module in self._present(with_originals=True).items()}
        return {path: self._verdict(suspect, built, path) for path, suspect in self.suspects.items()}

    def _see_changes(self) -> None:
        """See what has changed and what runs: on one process, for all of them."""
        for path, module in self._present().items() if self.is_watched else ():
            suspect = self.suspects[path]
            suspect.has_changed = suspect.has_changed or total(module) != suspect.total
        if self.suspects:
            seen = self.agree({path: (s.has_changed, s.is_used) for path, s in self.suspects.items()})
            for path, suspect in self.suspects.items():
                suspect.has_changed, suspect.is_used = seen[path]

    def _originals(self, verdicts: Mapping[str, Verdict], *wanted: Verdict) -> dict[str, str]:
        return {path: self.suspects[path].originals[0] for path, found in verdicts.items() if found in wanted}

    def _verdict(self, suspect: Suspect, built: Mapping[str, object], path: str) -> Verdict:
        """Return what becomes of a suspect; one that has stayed whole is not built as its originals any more."""
        if suspect.is_spared or any(
            built.get(path) != built.get(other, "gone") for other in suspect.originals
        ):
            return Verdict.APART
        if suspect.has_changed:
            return self._changed(path, suspect)
        if suspect.runs:
            is_early = suspect.is_alike and self.trains_on and not self.is_seen
            return Verdict.OPEN if is_early else Verdict.APART
        is_at_rest = suspect.is_alike and self._is_stepped and not suspect.is_used
        if suspect.is_clear and (suspect.is_certain or is_at_rest):
            return Verdict.FOLLOWS
        if not (suspect.is_alike or suspect.is_certain):
            return Verdict.APART
        return Verdict.OPEN if self.trains_on else Verdict.STAYS

    def _changed(self, path: str, suspect: Suspect) -> Verdict:
        if suspect.is_clear:
            return Verdict.FOLLOWS
        if not self.trains_on:
            return Verdict.APART if suspect.runs else Verdict.STAYS
        why = "runs in the same call" if suspect.runs else "may be an average of each of them"
        raise ValueError(
            f"`{path}` is built as {listed(suspect.originals)} and changes without gradients, but {why}, so that it "
            f"cannot follow when the model becomes smaller. {ADVICE}"
        )

    def _present(self, *, with_originals: bool = False) -> dict[str, nn.Module]:
        """Return the suspects that were not taken out of the model since, and what they may be averages of."""
        known = dict(self.model.named_modules()) if self.suspects else {}
        others = [other for s in self.suspects.values() for other in s.originals] if with_originals else []
        return {path: known[path] for path in (*self.suspects, *others) if path in known}

    def state_dict(self) -> dict[str, Any] | None:
        """Return what is watched, safe under `weights_only=True`; None where nothing is, or training does not go on."""
        if not (self.is_watched and self.trains_on):
            return None
        return {
            "is_seen": self.is_seen,
            "suspects": {path: dict(vars(s)) for path, s in self.suspects.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state_dict` returned, of what is still there."""
        if state is None or not self.is_watched:
            return
        known = dict(self.model.named_modules())
        self.is_seen = bool(state["is_seen"])
        self.suspects = {path: Suspect(**own) for path, own in state["suspects"].items() if path in known}
        self._note_uses()
