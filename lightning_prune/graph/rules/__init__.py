"""One small function per family of ATen operations: types of the inputs -> types of the outputs.

`register_rule` adds one for an operation of your own. What no rule knows freezes all that it touches.
"""

from lightning_prune.graph.rules import (
    attention,
    creation,
    indexing,
    joins,
    norms,
    pointwise,
    products,
    reductions,
    spatial,
    views,
)
from lightning_prune.graph.rules.table import Op, Types, register_rule, rule_of

__all__ = ["Op", "Types", "register_rule", "rule_of"]
_FAMILIES = (attention, creation, indexing, joins, norms, pointwise, products, reductions, spatial, views)
