"""Regularizers at work: gradients of coupled groups grow by what a penalty on their norms asks for."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.core.types import Name, Regularizer
from lightning_prune.graph import Group, Member
from lightning_prune.graph.projection import positions


def scales_of(model: nn.Module) -> set[Name]:
    """Return the names of the scales of all batch norms."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.affine}
    return {f"{name}.weight".lstrip(".") for name in norms}


@torch.no_grad()
def regularize_(
    regularizer: Regularizer,
    groups: Mapping[str, Group],
    parameters: Mapping[Name, nn.Parameter],
    scales: Container[Name],
    among: Container[int] | None = None,
) -> None:
    """Add the gradient of a penalty to the gradients of all weights of the groups.

    Args:
        regularizer: norms -> factors.
        groups: whose indices go as one piece.
        parameters: those that the groups reach, by name.
        scales: of batch norms, by name, for penalties over these.
        among: ids of the parameters whose gradients are changed; all by default.
    """
    for group in groups.values():
        members = [
            (parameters[m.tensor], m.dim, _index(m, parameters[m.tensor]))
            for m in group.members
            if m.tensor in parameters and (regularizer.over == "weights" or m.tensor in scales)
        ]
        if not members:
            continue
        square = torch.zeros(group.size, dtype=torch.float32, device=members[0][0].device)
        count = torch.zeros_like(square)
        for parameter, dim, index in members:
            others = parameter.detach().float().square().movedim(dim, 0).reshape(len(index), -1)
            _add_(square, index, others.sum(1))
            _add_(count, index, torch.full_like(others[:, 0], others.shape[1]))
        factor = regularizer(norm=square.sqrt(), count=count)
        for parameter, dim, index in members:
            if parameter.grad is not None and (among is None or id(parameter) in among):
                own = torch.where(index >= 0, factor[index.clamp_min(0)], 0.0).to(parameter.dtype)
                parameter.grad.addcmul_(
                    parameter, own.view([-1 if d == dim else 1 for d in range(parameter.dim())])
                )


def _index(member: Member, parameter: nn.Parameter) -> Tensor:
    return positions(member.type, member.atom).to(parameter.device)


def _add_(total: Tensor, index: Tensor, values: Tensor) -> None:
    total.index_add_(0, index[index >= 0], values[index >= 0])
