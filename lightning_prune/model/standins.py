"""A model run with other tensors in the place of its own: masked or sliced, in float64, and nothing is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lightning_prune.graph import Choice, Couplings, Plan
from lightning_prune.graph.replay import as_if
from lightning_prune.graph.run import plain_name, tensors_in
from lightning_prune.graph.sandbox import mode_of_training, plain_kernels, untouched
from lightning_prune.model.surgery import scaled, sliced
from lightning_prune.model.survivors import Survivors

LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
Precision = Mapping[torch.dtype, torch.dtype]
WIDE: Precision = dict.fromkeys(LOW_PRECISION, torch.float64) | {torch.complex64: torch.complex128}
Tensors = Mapping[str, Tensor]


class StandIns:
    """The masked and the small model, as two runs of the dense one.

    Args:
        couplings: of the dense model.
        tensors: what its parameters and buffers hold, by name; by default their own values.
        wide: whether in float64; some models run in their own precision only.
    """

    def __init__(self, couplings: Couplings, tensors: Tensors, *, wide: bool) -> None:
        self.couplings = couplings
        self.precision = WIDE if wide else {}
        self.own = {name: tensor for name, (tensor, _) in couplings.record.tensors.items()}
        self.tensors = {name: tensor.detach() for name, tensor in {**self.own, **tensors}.items()}

    def masked(self, choice: Choice, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the outputs with zeros for all that goes; means and variances run over what survives."""
        masks = self.couplings.masks(choice)
        values = {name: self._converted(tensor) for name, tensor in self.tensors.items()}
        for name in values.keys() & masks.keys():
            values[name] = values[name].masked_fill(~masks[name].to(values[name].device), 0)
        return self._run(values, {}, args, kwargs, Survivors(self.couplings, choice))

    def dense(self, args: Any, kwargs: Any, within: AbstractContextManager[Any]) -> list[Tensor]:
        """Return the outputs of the dense model, which runs within a context that may change what it does."""
        values = {name: self._converted(tensor) for name, tensor in self.tensors.items()}
        return self._run(values, {}, args, kwargs, within)

    def small(self, plan: Plan, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the outputs with tensors sliced and scaled, and attributes set, as planned."""
        values = {
            name: self._converted(sliced(tensor, plan.slices.get(name, {})))
            for name, tensor in self.tensors.items()
            if not any(scale.name == name for scale in plan.scales)
        }
        for name in self.tensors.keys() - values.keys():
            wide = self._converted(self.tensors[name])
            for scale in (scale for scale in plan.scales if scale.name == name):
                wide = scaled(wide, scale)
            values[name] = sliced(wide, plan.slices.get(name, {}))
        return self._run(values, plan.attributes, args, kwargs, nullcontext())

    def _run(
        self,
        values: Tensors,
        attributes: Mapping[str, Mapping[str, Any]],
        args: Any,
        kwargs: Any,
        within: AbstractContextManager[Any],
    ) -> list[Tensor]:
        run = self.couplings.run
        placed = {id(self.own[name]): _like(value, self.own[name]) for name, value in values.items()}
        args, kwargs = tree_map_only(
            Tensor, lambda t: self._converted(t.detach().clone()), (args, dict(kwargs))
        )
        with ExitStack() as stack:
            stack.enter_context(untouched(run.model))
            stack.enter_context(plain_kernels())
            stack.enter_context(mode_of_training(run.model.modules(), False))
            if self.precision:
                stack.enter_context(_default_dtype(torch.float64))
            stack.enter_context(as_if(run.paths, placed, attributes))
            if self.precision:
                stack.enter_context(_Wide())  # type: ignore[no-untyped-call]
            stack.enter_context(within)
            return list(tensors_in(run.model(*args, **kwargs)))

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.precision.get(tensor.dtype, tensor.dtype))


def _like(tensor: Tensor, original: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Wide(TorchDispatchMode):
    """Turns requests for lower precision, which some models make for their norms, into float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs |= {name: WIDE[kwargs[name]] for name in ("dtype", "out_dtype") if kwargs.get(name) in WIDE}
        if plain_name(func) == "_grouped_mm" and args[0].dtype == torch.float64:
            return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped_mm(rows: Tensor, matrices: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Multiply sorted rows (n, k) by the matrices (experts, k, m) of their experts; torch's own takes no float64."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    pieces = [r @ m for r, m in zip(rows.split([*sizes, len(rows) - sum(sizes)])[:-1], matrices, strict=True)]
    return torch.cat([*pieces, rows.new_zeros(len(rows) - sum(sizes), matrices.shape[-1])])
