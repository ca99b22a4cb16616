"""Factors that follow from sizes: which slices take up their correction, however tensors lie in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.graph import trace
from lightning_prune.model.equivalence import settle


class OneQuery(nn.Module):
    """Attention of one learned query over the rows of one example: fewer scores than slices behind the query."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.q(x.mean(1, keepdim=True)), self.k(x)
        scores = (query @ key.transpose(1, 2)) / query.shape[-1] ** 0.5
        return self.out(F.softmax(scores, -1) @ self.v(x))


def half(couplings):
    return {name: torch.arange(g.size) % 2 == 0 for name, g in couplings.groups.items()}


def test_fewer_scores_than_slices():
    torch.manual_seed(0)
    couplings = trace(OneQuery().eval(), (torch.randn(1, 2, 6),))
    choice, plan = settle(couplings, lambda: half(couplings))
    assert set(choice) == {"q.weight", "v.weight"} and plan.error < 1e-12
    assert {scale.name for scale in plan.scales} == {"q.weight", "q.bias"}
    assert all(len(scale.indices) == 8 for scale in plan.scales)
