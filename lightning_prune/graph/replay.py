"""Run a model on fake tensors as if it had been pruned, and compare every shape with the prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.flexible import flexible_attention
from lightning_prune.graph.projection import Counts, size_of
from lightning_prune.graph.record import Record
from lightning_prune.graph.rules.table import Op, Types
from lightning_prune.graph.run import Run, stage
from lightning_prune.graph.sizes import sizes_of
from lightning_prune.graph.trace import BY_PRODUCT, SILENT
from lightning_prune.graph.types import find, is_frozen


class MismatchError(Exception):
    """An operation's output has another shape than its types say."""


class _ShapeCheck(TorchDispatchMode):
    """Compares the shapes of a run with those of the record, operation by operation.

    Where the kernels differ (a clone in place of a view at size 1), nothing more is compared: the run itself judges.
    Nor are frozen dims of a run on real tensors, whose sizes may follow from values, as the tokens of an expert do.
    """

    def __init__(self, record: Record, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops, self.counts, self.is_fake = record.ops, counts, record.is_fake
        self.position, self.is_aligned = 0, True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if str(func) in SILENT or not tensors or not self.is_aligned:
            return output
        if self.position >= len(self.ops) or self.ops[self.position].func is not func:
            self.is_aligned = False
            return output
        for tensor, (_, nodes) in zip(tensors, self.ops[self.position].outputs, strict=False):
            if any(find(node).reason == BY_PRODUCT for node in nodes):
                continue
            expected = tuple(size_of(node, self.counts) for node in nodes)
            if not self._is_expected(tensor, nodes, expected):
                raise MismatchError(f"shape {tuple(tensor.shape)} where {expected} was expected")
        self.position += 1
        return output

    def _is_expected(self, tensor: Tensor, nodes: Types, expected: tuple[int, ...]) -> bool:
        """Compare the shapes of a tensor, dim by dim."""
        return tensor.dim() == len(expected) and all(
            size == wanted or (is_frozen(node) and not self.is_fake)
            for size, wanted, node in zip(tensor.shape, expected, nodes, strict=True)
        )


def replay(
    run: Run, record: Record, counts: Counts, attributes: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Op | None] | None:
    """Run the model with other sizes and return what is wrong and the operation where, or None where all is well.

    Args:
        run: what to run.
        record: of the dense model.
        counts: how many indices atoms keep.
        attributes: path -> name -> new value.
    """
    check = _ShapeCheck(record, counts)
    with ExitStack() as stack:
        args, kwargs = stack.enter_context(
            stage(run.model, run.args, run.kwargs, fake=record.is_fake, training=run.training)
        )
        sliced = {
            id(tensor): _sliced(tensor, tuple(size_of(node, counts) for node in types), record.is_fake)
            for tensor, types in record.tensors.values()
        }
        stack.enter_context(as_if(run.paths, sliced, attributes))
        stack.enter_context(check)
        try:
            run.model(*args, **kwargs)
        except Exception as error:  # whatever the model's code raises at a shape that it does not expect
            op = record.ops[min(check.position, len(record.ops) - 1)] if check.is_aligned else None
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            return f"{op.name if op else 'the model'} of {op.path if op else 'it'}: {message}", op
    return None


@contextmanager
def as_if(
    paths: Mapping[nn.Module, str],
    tensors: Mapping[int, Tensor],
    attributes: Mapping[str, Mapping[str, Any]],
) -> Iterator[None]:
    """Let a model have other parameters, buffers and attributes for a while, as surgery would leave it.

    Attentions are flexible, and the sizes that torch's modules keep are those of their tensors.

    Args:
        paths: module -> path, of all modules.
        tensors: id of a parameter or buffer -> what stands in for it.
        attributes: path -> name -> value.
    """
    with ExitStack() as stack:
        stack.enter_context(flexible_attention(paths))
        cut = []
        for module in paths:
            for place in (module._parameters, module._buffers):
                for name, tensor in list(place.items()):
                    if tensor is not None and id(tensor) in tensors:
                        stack.callback(place.__setitem__, name, tensor)  # type: ignore[arg-type]
                        place[name] = tensors[id(tensor)]  # type: ignore[assignment]
                        if tensors[id(tensor)].shape != tensor.shape:
                            cut.append(module)
        for module, path in paths.items():
            for name, value in attributes.get(path, {}).items():
                _set_(module, name, value, stack)
        for module in dict.fromkeys(cut):  # sizes follow from tensors and attributes, as in surgery
            for name, value in sizes_of(module).items():
                _set_(module, name, value, stack)
        yield


def _set_(module: nn.Module, name: str, value: object, undo: ExitStack) -> None:
    if name in vars(module):
        undo.callback(vars(module).__setitem__, name, vars(module)[name])
        vars(module)[name] = value
        return
    is_there, before = hasattr(module, name), getattr(module, name, None)
    undo.callback(lambda: setattr(module, name, before) if is_there else delattr(module, name))
    setattr(module, name, value)


def _sliced(tensor: Tensor, shape: tuple[int, ...], fake: bool) -> Tensor:
    """Return a tensor of another shape: the front of it, or where a fake mode is active one without storage."""
    if tuple(tensor.shape) == shape:
        return tensor
    if fake:
        sliced = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    else:
        sliced = tensor.detach()
        for dim, size in enumerate(shape):
            sliced = sliced.narrow(dim, 0, size)
    return nn.Parameter(sliced, requires_grad=False) if isinstance(tensor, nn.Parameter) else sliced
