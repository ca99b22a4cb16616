"""Structured pruning that makes up for what goes: layers that lose inputs take the best values for those they keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.core.types import Name, Solver
from lightning_prune.graph.record import Record
from lightning_prune.model.activations import owners_of
from lightning_prune.model.calibration import call_model, evaluating
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.layerwise import Progress
from lightning_prune.model.matrices import Grams, Matrix, find_matrix
from lightning_prune.model.passes import Step
from lightning_prune.model.stages import stages_of


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that loses inputs.

    Args:
        weight: its weight.
        matrix: the weight as a matrix (out, in).
        kept: the inputs that stay, bool (in,).
        bias: its own bias, which makes up for the means of what goes.
        mean: without a bias, the running mean of the batch norm behind it, which does the same.
    """

    weight: nn.Parameter
    matrix: Matrix
    kept: Tensor
    bias: Tensor | None
    mean: Tensor | None

    @property
    def can_shift(self) -> bool:
        """Whether it can add a constant to its outputs."""
        return self.bias is not None or self.mean is not None

    @property
    def seen(self) -> Matrix:
        """The matrix, whose inputs have one more that is always 1 where the layer can add a constant."""
        features: Callable[[Tensor], Tensor] = self.matrix.features
        if not self.can_shift:
            return self.matrix
        return replace(self.matrix, features=lambda x: F.pad(features(x), (0, 1), value=1.0))

    def solve_(self, solver: Solver, gram: Tensor, undo: ExitStack) -> None:
        """Write the best values in place, for all rows: those that will go still feed what is solved next."""
        weight, kept = self.matrix.to_matrix(self.weight.detach().float()), self.kept
        if self.can_shift:
            constant = weight.new_zeros(len(weight)) if self.bias is None else self.bias.detach().float()
            weight, kept = torch.cat([weight, constant[:, None]], 1), F.pad(kept, (0, 1), value=True)
        new, _ = solver(weight=weight, gram=gram, mask=kept.expand_as(weight))
        if self.bias is not None:
            _write_(self.bias, new[:, -1], undo)
        elif self.mean is not None:
            _write_(self.mean, self.mean - new[:, -1], undo)
        _write_(self.weight, self.matrix.to_weight(new[:, : len(self.kept)]), undo)


def reconstruct_(
    pruner: GroupPruner,
    solver: Solver,
    batches: Iterable[Any] | None,
    undo: ExitStack,
    *,
    forward: Step | None = None,
    blocks: str | None = None,
    progress: Progress[Any] = iter,
) -> tuple[Name, ...]:
    """Solve for the layers that lose inputs, one after the other, before anything is taken out.

    He, Zhang & Sun 2017 (arXiv:1707.06168), section 3.1, step (ii), and Luo et al. 2017, ThiNet (arXiv:1707.06342),
    section 3.3: W' = argmin ||W X - W'_S X_S||^2 over the kept inputs S, X being what the layers before, which are
    solved, give; here for all layers that read a coupled group, and with a bias, or the mean of a batch norm behind, as
    the weight of an input that is always 1. Other statistics of batch norms are to be taken anew afterwards.

    Args:
        pruner: its groups are chosen; the choice is proved first, and nothing is masked yet.
        solver: weight, gram and mask -> the best values.
        batches: calibration data.
        undo: puts the weights back, if it is run.
        forward: as for `calibrate`.
        blocks: as for `solve_`.
        progress: stages -> the same, shown as they go by.

    Returns:
        The weights that were solved for. Grouped and transposed convolutions, and attentions in one piece, are not.

    Raises:
        ValueError: no calibration data, or inputs that are not finite.
    """
    data = list(batches or ())
    if not data:
        raise ValueError("`batches` is calibration data, which a solver needs, but got none.")
    pruner.plan()
    readers = readers_of(pruner)
    matrices = {name: reader.matrix for name, reader in readers.items()}
    if not readers:
        return ()
    with torch.no_grad(), evaluating(pruner.model):
        for stage in progress(stages_of(pruner.model, matrices, data, forward or call_model, blocks)):
            grams = Grams({name: readers[name].seen for name in stage.names})
            with grams.watch():
                stage.run()
            for name in stage.names:
                readers[name].solve_(solver, grams.read(name), undo)
            stage.leave()
    return tuple(readers)


def readers_of(pruner: GroupPruner) -> dict[Name, Reader]:
    """Return the linear layers and ungrouped 2d convolutions that lose inputs by a pruner's choice."""
    found, means = {}, _means_behind(pruner.couplings.record)
    for name, mask in pruner.couplings.masks(pruner.choice).items():
        weight = pruner.targets.get(name)
        matrix = find_matrix(pruner.model, weight) if weight is not None else None
        if weight is None or matrix is None:
            continue
        kept = matrix.to_matrix(mask).any(0).to(weight.device)
        if not bool(kept.all()):
            bias = getattr(matrix.module, "bias", None)
            mean = means.get(matrix.module) if bias is None else None
            found[name] = Reader(weight, matrix, kept, _own(pruner.model, bias), mean)
    return found


def _own(model: nn.Module, bias: object) -> nn.Parameter | None:
    """Return a bias that one layer has for itself."""
    return bias if isinstance(bias, nn.Parameter) and len(owners_of(model, bias)) == 1 else None


def _means_behind(record: Record) -> dict[nn.Module, Tensor]:
    """Return the running mean of the batch norm behind each layer whose output nothing else reads."""
    times = Counter(id(tensor) for op in record.ops for tensor, _ in op.inputs)
    made: dict[int, nn.Module] = {}
    for call in record.calls:  # inner modules return before those that they are a part of
        made.setdefault(id(call.output), call.module)
    return {
        made[id(call.input)]: call.module.running_mean
        for call in record.calls
        if isinstance(call.module, _BatchNorm)
        and isinstance(call.module.running_mean, Tensor)
        and times[id(call.input)] == 1
        and id(call.input) in made
    }


def _write_(tensor: Tensor, value: Tensor, undo: ExitStack) -> None:
    undo.callback(torch.no_grad()(tensor.copy_), tensor.detach().clone())
    tensor.copy_(value)
