"""Gradient statistics: sums over optimizer steps while training, or over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.core.types import Name
from lightning_prune.model.ranks import is_distributed
from lightning_prune.model.shards import local
from lightning_prune.model.surgery import sliced

Found = dict[str, dict[Name, Tensor]]

SUMMANDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad": lambda weight, grad: _wide(grad, copy=True),
    "grad_mean": lambda weight, grad: _wide(grad, copy=True),
    "grad_square": lambda weight, grad: _wide(grad).square(),
    "movement": lambda weight, grad: -_wide(weight) * grad,
}
"""What each gradient adds to a statistic: (weight, gradient) -> summand, in float32 at least."""
SECOND_ORDER = ("hessian_diagonal", "hessian_gradient")
FLOW = "flow_gradient"
KINDS = (*SUMMANDS, *SECOND_ORDER, FLOW)
RUNNING = ("movement", "grad_mean", "grad_square")  # in training over all steps, not the one of an update
LASTING = ("movement",)  # this one goes on after an update
UNSEEN = "no gradient reached it. Exclude it, or prune after a backward pass."
UNREACHED = (
    "no flow reaches it, which begins behind embeddings and runs through what a step calls. Exclude it."
)


class Gradients:
    """Totals and counts of what was asked for; the mean of them is what a criterion reads, but of movement the sum.

    Args:
        targets: parameters by name.
        kinds: what to collect, from `KINDS`.
    """

    def __init__(self, targets: Mapping[Name, nn.Parameter], kinds: Sequence[str]) -> None:
        self.targets, self.kinds = targets, tuple(kinds)
        self.totals: Found = {kind: {} for kind in kinds}
        self.counts: dict[str, dict[Name, int]] = {kind: {} for kind in kinds}
        self._pending: Found = {}

    @torch.no_grad()
    def note(self, among: Container[int] | None = None, kinds: Container[str] = KINDS) -> None:
        """Note the gradients of all targets, or of those whose ids are `among` the given ones; see `confirm`."""
        for name, p in self.targets.items():
            if p.grad is not None and (among is None or id(p) in among):
                weight, grad = local(p.detach()), local(p.grad.detach())
                for kind in self.kinds:
                    if kind in SUMMANDS and kind in kinds:
                        self._pending.setdefault(kind, {})[name] = SUMMANDS[kind](weight, grad)

    @property
    def is_noted(self) -> bool:
        """Whether something is noted that was not taken over yet."""
        return bool(self._pending)

    def confirm(self) -> None:
        """Take over what was noted."""
        for kind, noted in self._pending.items():
            for name, value in noted.items():
                self.add_(kind, name, value)
        self._pending = {}

    def add_(self, kind: str, name: Name, value: Tensor) -> None:
        """Add one summand, which is no one else's, to a total."""
        total, counts = self.totals[kind], self.counts[kind]
        total[name] = total[name].add_(value) if name in total else _wide(value)
        counts[name] = counts.get(name, 0) + 1

    @property
    def is_complete(self) -> bool:
        """Whether every target has a value of every kind."""
        return all(found.keys() == self.targets.keys() for found in self.totals.values())

    def clear(self) -> None:
        """Forget all but what lasts."""
        for kind in self.kinds:
            if kind not in LASTING:
                self.totals[kind], self.counts[kind] = {}, {}

    @torch.no_grad()
    def sum_over_processes_(self) -> None:
        """Add up what the processes have found on batches of their own; afterwards all have the same."""
        if not is_distributed():
            return
        for kind, totals in self.totals.items():
            for name, parameter in self.targets.items():
                total = totals[name] if name in totals else _wide(torch.zeros_like(parameter))
                total = total.contiguous()
                count = torch.tensor(self.counts[kind].get(name, 0), device=parameter.device)
                torch.distributed.all_reduce(total)
                torch.distributed.all_reduce(count)
                if count:
                    totals[name], self.counts[kind][name] = total, int(count)

    def read(self, kind: str, name: Name) -> Tensor:
        """Return a statistic of one target.

        Raises:
            ValueError: no gradient has reached it.
        """
        if name not in self.totals[kind]:
            raise ValueError(f"`{name}` has no `{kind}`: {UNREACHED if kind == FLOW else UNSEEN}")
        total, count = self.totals[kind][name], self.counts[kind][name]
        return total if kind in LASTING or count == 1 else total / count

    def cut_(self, slices: Mapping[Name, Mapping[int, Sequence[int]]]) -> None:
        """Follow parameters that have become smaller."""
        for found in (*self.totals.values(), *self._pending.values()):
            found |= {name: sliced(found[name], dims) for name, dims in slices.items() if name in found}

    def state_dict(self) -> dict[str, Tensor]:
        """Return totals and counts: "kind.total.name" and "kind.count.name" -> tensor."""
        totals = {f"{k}.total.{n}": total for k, found in self.totals.items() for n, total in found.items()}
        counts = {
            f"{k}.count.{n}": torch.tensor(c) for k, found in self.counts.items() for n, c in found.items()
        }
        return totals | counts

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, as far as it is asked for now.

        Raises:
            ValueError: it has another form.
        """
        for key, tensor in state.items():
            kind, what, name = (*key.split(".", 2), "", "")[:3]
            if kind not in KINDS or what not in ("total", "count"):
                raise ValueError(
                    f"`statistics` of the checkpoint are totals and counts, but got {key!r}: another version of "
                    "lightning_prune wrote it."
                )
            if kind not in self.kinds or name not in self.targets:
                continue
            if what == "total":
                self.totals[kind][name] = tensor.to(self.targets[name].device, copy=True)
            else:
                self.counts[kind][name] = int(tensor)


def _wide(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return a tensor in a precision in which many can be summed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=copy)
