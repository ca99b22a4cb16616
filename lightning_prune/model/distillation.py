"""How far a network's answers are from those of another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(logits: Tensor, goals: Tensor, temperature: float, class_dim: int = -1) -> Tensor:
    """Return T^2 KL(softmax(goals / T) || softmax(logits / T)), a mean over all positions.

    Hinton et al. 2015 (arXiv:1503.02531), section 2; T^2 keeps its gradient as large as that of the labels.

    Args:
        logits: of the student, any shape.
        goals: of the teacher, of the same shape.
        temperature: T, above 0; the higher it is, the more the small probabilities count.
        class_dim: along which classes lie.

    Example:
        >>> float(distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), temperature=2.0))
        0.0
    """
    ours, theirs = (F.log_softmax(t.float() / temperature, class_dim) for t in (logits, goals))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(class_dim).mean()


def feature_loss(features: Sequence[Tensor], goals: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference of features, over all layers: Romero et al. 2014 (arXiv:1412.6550), eq. 3."""
    return torch.stack(
        [F.mse_loss(a.float(), b.float()) for a, b in zip(features, goals, strict=True)]
    ).mean()
