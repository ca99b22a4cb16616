"""Multiply-accumulates of one call, by torch's own flop counter, shared out among the weights that take part.

The counter knows no formula for some operators and counts them as nothing: those that matter have one here, others
are named, so that no sum is too low without a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.core.types import Name
from lightning_prune.model.shards import num_nonzeros

WITH_ADDEND = (
    "addmm",
    "baddbmm",
    "addbmm",
    "addmv",
    "_addmm_activation",
)  # their first argument is only added
NOT_COUNTED = (  # products of tensors without a formula; all other operators of torch are elementwise, copies, ...
    "_cdist_forward",
    "_grouped_mm",
    "_int_mm",
    "_native_multi_head_attention",
    "_pdist_forward",
    "_sparse_mm",
    "_transformer_encoder_layer_fwd",
    "_weight_int4pack_mm",
    "_weight_int8pack_mm",
    "linalg_",
    "miopen_rnn",
)
ELEMENTWISE = ("linalg_vector_norm", "linalg_cross", "linalg_diagonal", "linalg_vecdot")
"""What begins like those and is none: sums of squares and the like."""


@dataclass
class Macs:
    """What was counted.

    Args:
        total: multiply-accumulates of the call.
        effective: the same, those of each weight multiplied by its density.
        by_name: parameter -> those in which it takes part.
        unknown: operators on weights that the counter has no formula for: the numbers above are too low.
        foreign: operators from outside of torch, without weights, that are left out.
    """

    total: int = 0
    effective: int = 0
    by_name: Counter[Name] = field(default_factory=Counter)
    unknown: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)


def count_macs(model: nn.Module, run: Callable[[], object]) -> Macs:
    """Count the multiply-accumulates of `run`, which calls `model` or a part of it.

    Each operator's count is that of its dense form, half of its floating-point operations; elementwise operators,
    norms and look-ups count as nothing. It goes to the weights among its operands (in proportion to their size where
    there are several, as in a recurrent layer), also to those that were cast, masked or normalised before.

    Example:
        >>> net = nn.Linear(3, 4)
        >>> with torch.no_grad():
        ...     count_macs(net, lambda: net(torch.ones(2, 3))).by_name
        Counter({'weight': 24})
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    watch = _Watch(model, counter)
    with _no_fused_attention(), counter, watch:
        run()
    return watch.found


class _NoModules(nullcontext[None]):
    """Stands in for what tells the counter which module runs, which is not asked for here.

    That one hooks itself into the backward pass of whatever requires a gradient, and fails where there is none to come:
    at views of a parameter, as a decoder's queries are, without gradients.
    """

    parents = ("Global",)


class _Watch(TorchDispatchMode):
    """Sees each operator before the counter does, and shares out what the counter adds for it."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self._counter = Macs(), counter
        self._names: dict[int, frozenset[Name]] = {
            _storage(buffer): frozenset() for buffer in model.buffers()
        }
        self._names |= {
            _storage(parameter): frozenset([name]) for name, parameter in model.named_parameters()
        }
        self._sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self._derived: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        macs = (self._counter.get_total_flops() - before) // 2
        name = func.name().split(".")[0].removeprefix("aten::")
        operands = _tensors([*args[name in WITH_ADDEND :], *(kwargs or {}).values()])
        if macs:
            self._share_out(macs, [t for t in operands if t.dim() >= 2 and self._names_of(t)])
        else:
            self._check_formula(func, name, operands)
            self._follow(operands, out)
        return out

    def _share_out(self, macs: int, weights: list[Tensor]) -> None:
        self.found.total += macs
        size = sum(weight.numel() for weight in weights)
        self.found.effective += 0 if size else macs
        for weight in weights:
            share = macs * weight.numel() // size
            self.found.effective += share * num_nonzeros(weight) // weight.numel()
            names = sorted(self._names_of(weight) or ())
            largest = max(
                self._sizes[name] for name in names
            )  # the weight itself, not its scale or low-rank update
            self.found.by_name[next(name for name in names if self._sizes[name] == largest)] += share

    def _check_formula(self, func: Any, name: str, operands: list[Tensor]) -> None:
        if getattr(func, "_overloadpacket", func) in self._counter.flop_registry:
            return
        is_foreign = "::" in name and not name.startswith(("prim", "c10d", "_c10d", "profiler"))
        is_product = name.startswith(NOT_COUNTED) and name not in ELEMENTWISE
        if is_product or (is_foreign and any(t.dim() >= 2 and self._names_of(t) for t in operands)):
            self.found.unknown.add(name)
        elif is_foreign:
            self.found.foreign.add(name)

    def _follow(self, operands: list[Tensor], out: Any) -> None:
        """What is computed from weights and constants alone is still a weight: a cast, masked or normalised one."""
        sources = [self._names_of(tensor) for tensor in operands if tensor.dim()]
        if None not in sources and (names := frozenset().union(*(s for s in sources if s))):
            for tensor in _tensors([out]):
                self._derived[tensor] = names

    def _names_of(self, tensor: Tensor) -> frozenset[Name] | None:
        """Return the parameters that a tensor is (a view of), or is computed from; None for activations."""
        found: frozenset[Name] | None = self._names.get(_storage(tensor), self._derived.get(tensor))
        return found


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors among arguments and lists of arguments."""
    flat = [entry for value in values for entry in (value if isinstance(value, (list, tuple)) else [value])]
    return [entry for entry in flat if isinstance(entry, Tensor)]


def _storage(tensor: Tensor) -> int:
    """Identify the memory behind a tensor; sparse ones have none, and are themselves."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """Switch off the transformer layers' one fused operator, which hides their products from the counter."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return shapes -> flops for operators that the counter does not know."""
    formulas: dict[str, Callable[..., int]] = {
        "mv": lambda a, *_, **__: 2 * math.prod(a),
        "addmv": lambda _, a, *__, **___: 2 * math.prod(a),
        "dot": lambda a, *_, **__: 2 * math.prod(a),
        "vdot": lambda a, *_, **__: 2 * math.prod(a),
        "addbmm": lambda _, a, b, **__: 2 * math.prod(a) * b[-1],
        "_addmm_activation": lambda _, a, b, **__: 2 * math.prod(a) * b[-1],
        "_trilinear": lambda a, weight, *_, **__: 2 * math.prod(a[:-1]) * math.prod(weight),
        "mkldnn_rnn_layer": lambda x, *w, **_: 2 * math.prod(x[:-1]) * (math.prod(w[0]) + math.prod(w[1])),
        "_cudnn_rnn": lambda x, w, *_, **__: (
            2 * math.prod(x[:-1]) * sum(math.prod(s) for s in w if len(s) >= 2)
        ),
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
    }
    known = {
        getattr(torch.ops.aten, name): f for name, f in formulas.items() if hasattr(torch.ops.aten, name)
    }
    return {operator: formula for operator, formula in known.items() if operator not in flop_registry}


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the flops of softmax(Q K^T) V, whole: also where a causal mask would save half."""
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
