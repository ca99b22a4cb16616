"""Dimension types: which slices of which tensors are coupled, inferred from one run of the model."""

from lightning_prune.graph.couplings import Couplings, trace
from lightning_prune.graph.depth import Block
from lightning_prune.graph.groups import Group, Member
from lightning_prune.graph.plan import Plan, Scale
from lightning_prune.graph.planning import Choice, Unsolvable
from lightning_prune.graph.rules import Op, Types, register_rule

__all__ = [
    "Block",
    "Choice",
    "Couplings",
    "Group",
    "Member",
    "Op",
    "Plan",
    "Scale",
    "Types",
    "Unsolvable",
    "register_rule",
    "trace",
]
