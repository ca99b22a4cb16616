"""Where it is faster to step the surviving weights alone than to step all and mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn, optim
from torch.optim import Optimizer


class Reach(NamedTuple):
    """Where steps of the survivors alone are clearly faster: up to which density, and from how many weights on."""

    density: float
    numel: int


ONE_PASS = Reach(0.12, 1 << 17)
"""Of kernels that pass over the weights once."""
SOME_PASSES = Reach(0.2, 1 << 17)
MANY_PASSES = Reach(0.25, 1 << 14)
ELEMENTWISE: Mapping[type[Optimizer], Reach] = {
    optim.SGD: ONE_PASS,
    optim.RMSprop: SOME_PASSES,
    optim.Adagrad: SOME_PASSES,
    **dict.fromkeys(
        (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adadelta), MANY_PASSES
    ),
}
"""Optimizers that step each weight by itself, with what was measured of them (benchmarks/README.md)."""


def is_worth_it(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter, mask: Tensor
) -> bool:
    """Tell whether to step the survivors of a parameter alone.

    So it is where the optimizer steps each weight by itself and remembers something of each, and the survivors are few
    enough. On GPUs it is slower than masking (benchmarks/README.md), so it is done on the CPU alone.
    """
    reach = ELEMENTWISE.get(type(optimizer))
    if (
        reach is None
        or group.get("differentiable")
        or (type(optimizer) is optim.SGD and not group["momentum"])
    ):
        return False
    reach = ONE_PASS if group.get("fused") else reach
    is_plain = (
        type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()
    )
    if not is_plain or not parameter.is_floating_point() or parameter.numel() < reach.numel:
        return False
    return int(mask.count_nonzero()) <= reach.density * mask.numel()
