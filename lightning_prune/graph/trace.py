"""Run a model once on fake tensors and infer the type of every dim.

Two modes watch the run: one sees ATen operations and applies the rules, the other sees the calls of Python code, where
sizes are still the integers that the code computed them from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.attributes import traced_integers
from lightning_prune.graph.equations import Equation
from lightning_prune.graph.flexible import flexible_attention
from lightning_prune.graph.integers import Attribute, attributes_of
from lightning_prune.graph.python_calls import PythonCalls
from lightning_prune.graph.record import ModuleCall, Record
from lightning_prune.graph.refinement import ConflictError, unify
from lightning_prune.graph.rules.table import Op, Types, freeze_all, frozen, rule_of
from lightning_prune.graph.run import Run, plain_name, stage, tensors_in
from lightning_prune.graph.sizes import dims_of
from lightning_prune.graph.types import Type, find, frozen_type

BY_PRODUCT = "by-product of an operation"
SILENT = {"aten.detach.default", "aten.alias.default", "aten.lift_fresh.default", "aten.detach_.default"}
"""Operations that the two runs of a model need not agree on."""


class Tracer:
    """The types of all tensors that are alive in a run, by identity; the record keeps them alive.

    Args:
        named: parameters and buffers by name.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._types: dict[int, Types] = {}
        self._alive: list[Tensor] = []
        self.path: list[str] = [""]
        self.used: set[int] = set()
        """Ids of what operations have read, silent ones too."""
        self.returned: dict[int, str] = {}
        """Id of what an outermost module has returned -> its path."""
        for tensor in named.values():
            self.enter(tensor, _types_of_state(tensor))
        self.record = Record({name: (tensor, self.types(tensor)) for name, tensor in named.items()})

    def types(self, tensor: Tensor) -> Types:
        """Return the types of a tensor's dims; one that was never seen comes from outside and is frozen."""
        if id(tensor) not in self._types:
            self.enter(tensor, frozen(tensor.shape, "input of the model or a constant"))
        return self._types[id(tensor)]

    def enter(self, tensor: Tensor, types: Types) -> None:
        """Set the types of a new tensor."""
        assert [find(node).size for node in types] == list(tensor.shape), (types, tensor.shape)
        self._types[id(tensor)] = list(types)
        self._alive.append(tensor)

    def see(self, op: Op) -> None:
        """Apply the rule for an operation that has run, and write it down."""
        op.inputs = [(t, self.types(t)) for t in tree_leaves((op.args, op.kwargs)) if isinstance(t, Tensor)]
        self.used.update(id(t) for t, _ in op.inputs)
        tensors = [t for t in tree_leaves(op.output) if isinstance(t, Tensor)]
        results = self._apply_rule(op, tensors)
        known = {id(t) for t, _ in op.inputs}
        for tensor, types in zip(tensors, results, strict=True):
            if id(tensor) in known and torch.Tag.inplace_view not in op.func.tags:
                for a, b in zip(types, self.types(tensor), strict=True):
                    unify(a, b)
            else:
                self.enter(tensor, types)
        op.outputs = [(t, self.types(t)) for t in tensors]
        if str(op.func) not in SILENT:
            self.record.ops.append(op)

    def _apply_rule(self, op: Op, tensors: list[Tensor]) -> list[Types]:
        """Return the types of all outputs; what no rule knows freezes all that it touches."""
        rule = rule_of(op.func, op.name)
        try:
            result = rule(op) if rule else None
        except (ConflictError, AssertionError, IndexError, TypeError) as error:
            result, reason = None, f"{op.name}: {error}"
        else:
            reason = f"{op.name} has no rule"
        if result is None:
            for _, types in op.inputs:
                freeze_all(types, reason)
            return [frozen(t.shape, reason) for t in tensors]
        listed = _listed(result)
        fits = [k < len(listed) and _fits(listed[k], t) for k, t in enumerate(tensors)]
        return [listed[k] if fits[k] else frozen(t.shape, BY_PRODUCT) for k, t in enumerate(tensors)]


class _AtenCalls(TorchDispatchMode):
    """Shows every ATen operation to the tracer."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if any(isinstance(t, Tensor) for t in tree_leaves(output)):
            path = self.tracer.path[-1]
            self.tracer.see(Op(plain_name(func), func, args, kwargs, output, path, self.tracer.types))
        return output


def record_run(run: Run, *, fake_alone: bool = False) -> Record:
    """Run a model on fake tensors, or on real ones where its code reads values, and return what was seen."""
    try:
        return _record(run, fake=True)
    except Exception:  # whatever fake tensors cannot do; a model that does not run at all fails again below
        if fake_alone:
            raise
        return _record(run, fake=False)


def _record(run: Run, *, fake: bool) -> Record:
    tracer = Tracer(run.named)
    tracer.record.is_fake = fake
    tracer.record.equations += _checked_sizes(run.paths, tracer)
    with ExitStack() as stack:
        args, kwargs = stack.enter_context(
            stage(run.model, run.args, run.kwargs, fake=fake, training=run.training)
        )
        stack.enter_context(flexible_attention(run.paths))
        stack.enter_context(traced_integers(run.paths))
        stack.enter_context(_calls_followed(tracer, run.paths))
        stack.enter_context(_AtenCalls(tracer))
        stack.enter_context(PythonCalls(tracer))
        output = run.model(*args, **kwargs)
        for tensor in tensors_in(output):
            path = None if run.model in run.paths else tracer.returned.get(id(tensor))
            freeze_all(tracer.types(tensor), f"output of `{path}`" if path else "output of the model")
    tracer.record.equations += _sizes_of_factors(run.paths, tracer)
    for tensor, types in tracer.record.tensors.values():
        if id(tensor) not in tracer.used:
            freeze_all(types, "no part of the traced call")
    return tracer.record


def _checked_sizes(paths: Mapping[nn.Module, str], tracer: Tracer) -> list[Equation]:
    """Recurrent layers and instance norms check their inputs against sizes that they never pass on."""
    found = []
    for module, path in paths.items():
        sizes: dict[str, tuple[Any, int]] = {}
        if isinstance(module, nn.RNNBase):
            hidden = "proj_size" if module.proj_size else "hidden_size"
            sizes = {"input_size": (module.weight_ih_l0, 1), hidden: (module.weight_hh_l0, 1)}
        elif isinstance(module, _InstanceNorm) and module.affine:
            sizes = {"num_features": (module.weight, 0)}
        for name, (weight, dim) in sizes.items():
            attribute = Attribute(path, name, None, getattr(module, name))
            found.append(Equation(attribute, tracer.types(weight)[dim], f"{name} of {path}"))
    return found


def _sizes_of_factors(paths: Mapping[nn.Module, str], tracer: Tracer) -> list[Equation]:
    """Sizes of torch's modules that are in a factor and nowhere else, as in `x * emb.embedding_dim**0.5`."""
    modules = {path: module for module, path in paths.items()}
    factors = dict.fromkeys(a for site in tracer.record.scales for a in attributes_of(site.factor))
    known = {a for equation in tracer.record.equations for a in attributes_of(equation.expression)}
    found = []
    for attribute in (a for a in factors if a not in known):
        module = modules[attribute.path]
        place = attribute.name if attribute.index is None else (attribute.name, attribute.index)
        weight, dim = module._parameters.get("weight"), dims_of(module).get(place)
        if (
            weight is None or dim is None or weight.shape[dim] != attribute.value
        ):  # as that of a grouped convolution
            continue
        where = f"{attribute.name} of {attribute.path}"
        found.append(Equation(attribute, tracer.types(weight)[dim], where))
    return found


@contextmanager
def _calls_followed(tracer: Tracer, paths: Mapping[nn.Module, str]) -> Iterator[None]:
    """Keep the path of the module that runs on top of the tracer's stack, and write down calls that return."""

    def enter(module: nn.Module, _: Any) -> None:
        tracer.path.append(paths[module])

    def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        path = tracer.path.pop()
        if len(tracer.path) == 1:
            tracer.returned |= {id(tensor): path for tensor in tensors_in(output)}
        names = [] if args else [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        first = args[0] if args else kwargs[names[0]] if names else None
        result = output[0] if isinstance(output, (tuple, list)) and output else output
        x, y = (t if isinstance(t, Tensor) else None for t in (first, result))
        num_outputs = len(output) if isinstance(output, (tuple, list)) else None
        tracer.record.calls.append(ModuleCall(path, module, x, y, num_outputs, *names[:1]))

    with ExitStack() as hooks:
        for module in paths:
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
        yield


def _types_of_state(tensor: Tensor) -> Types:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return frozen(tensor.shape, "integers of a buffer")
    return [Type(size) if size > 1 else frozen_type(size, "of size 1") for size in tensor.shape]


def _listed(result: Any) -> list[Types]:
    """Return what a rule gave as one entry for each output."""
    return list(result) if result and isinstance(result[0], list) else [result]


def _fits(types: Types, tensor: Tensor) -> bool:
    return [find(node).size for node in types] == list(tensor.shape)
