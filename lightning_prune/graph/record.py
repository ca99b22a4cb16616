"""What one run of a model has shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_prune.graph.equations import Equation
from lightning_prune.graph.python_calls import ScaleSite
from lightning_prune.graph.rules.table import Op, Types


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module.

    Args:
        path: of the module.
        module: itself.
        input: the first positional argument if it is a tensor; without any, the first keyword argument that is one.
        output: what it returned, or the first entry of that, if it is a tensor.
        num_outputs: how long the tuple is that it returned, or None where it is none.
        argument: the name of `input`, where it is passed by keyword.
    """

    path: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None
    num_outputs: int | None = None
    argument: str | None = None


@dataclass(eq=False)
class Record:
    """What one run of a model has shown.

    Args:
        tensors: parameters and buffers by name, and the types of their dims.
        ops: all ATen operations in their order, with the types of inputs and outputs.
        equations: between sizes in the code and types.
        scales: where a factor was computed from the size of a dim, as in attention.
        calls: of modules, in the order in which they returned.
        is_fake: whether the run was on fake tensors; some models need real ones.
    """

    tensors: dict[str, tuple[Tensor, Types]]
    ops: list[Op] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)
    scales: list[ScaleSite] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    is_fake: bool = True
