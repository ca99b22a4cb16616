"""Models with their code: ONNX, which many runtimes read, and programs of torch.export. Each file is compared."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.model.calls import tensors_of
from lightning_prune.model.export.calls import Checks, compared, exporting
from lightning_prune.model.export.formats import check_installed, checked_path
from lightning_prune.report.exports import Exported

ANSI = re.compile(r"\x1b\[[0-9;]*m")
OF_SIZES = re.compile(r"(?i)constraint|speciali[sz]|symbolic|symint|guard|\bDim\b|\bs\d+\b")
"""What torch says where a size that may change is in the way; `s77` is such a size."""


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
    latency: bool = True,
) -> Exported:
    """Write a model as ONNX, run it by onnxruntime on the CPU, and keep it only if its outputs are the model's.

    Zeros make no ONNX file smaller or faster; a model that is physically smaller is (`shrink`). What is larger than
    2 GB keeps its weights in a second file beside the first.

    Args:
        model: any module on the CPU; it is exported in eval mode, and stays as it is.
        example: its arguments: a tensor, a tuple of positional or a mapping of keyword arguments.
        path: of the file, which ends in ".onnx".
        dynamic_batch: whether the batch, the first dim of the inputs, may change; then a batch of twice the size is
            compared as well.
        tolerance: largest difference of the outputs, relative to the largest one.
        latency: whether a call of the model and one of onnxruntime are measured, in turns and on one thread.

    Returns:
        Sizes, the difference, and both latencies.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing: `pip install 'lightning-prune[export]'`.
        ValueError: the model cannot be exported, or the file computes something else. No file is written then.

    Example:
        >>> export_onnx(model, torch.randn(8, 3, 32, 32), "model.onnx").error  # doctest: +SKIP
    """
    check_installed("onnx")
    place, checks = checked_path(path, "onnx"), Checks(tolerance, dynamic_batch, latency)
    with exporting(model, example, checks) as (call, dims), _silent():
        with _explained("onnx", checks):
            args = (
                call.args if call.kwargs else (*call.args, {})
            )  # else a dict at the end is taken for kwargs
            program: Any = torch.onnx.export(
                model, args, kwargs=dict(call.kwargs), dynamo=True, dynamic_shapes=dims, verbose=False
            )
        return compared(place, "onnx", call, checks, lambda p: program.save(str(p)), Session)


def export_program(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
    latency: bool = True,
) -> Exported:
    """Write a model as a program of torch.export, which `torch.export.load(path).module()` runs without its class.

    Args:
        model: as for `export_onnx`.
        example: the same.
        path: of the file, which ends in ".pt2".
        dynamic_batch: the same.
        tolerance: the same.
        latency: the same, for a call of the program.

    Raises:
        ValueError: as for `export_onnx`.

    Example:
        >>> export_program(model, torch.randn(8, 3, 32, 32), "model.pt2").error  # doctest: +SKIP
    """
    place, checks = checked_path(path, "pt2"), Checks(tolerance, dynamic_batch, latency)
    with exporting(model, example, checks) as (call, dims), _silent():
        with _explained("pt2", checks):
            program = torch.export.export(model, call.args, dict(call.kwargs), dynamic_shapes=dims)
        program.example_inputs = None  # they are the user's data, and no part of the model

        def load(path: Path) -> nn.Module:
            return torch.export.load(path).module()

        return compared(place, "pt2", call, checks, lambda p: torch.export.save(program, p), load)


class Session(nn.Module):
    """A file that onnxruntime runs, on the CPU and one thread.

    Args:
        path: of the ONNX file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [found.name for found in self.session.get_inputs()]

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the outputs for the tensors among the arguments, in their order."""
        arrays = [tensor.numpy() for tensor in tensors_of((args, kwargs))]
        found = self.session.run(None, dict(zip(self.names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in found]


@contextmanager
def _explained(format: str, checks: Checks) -> Iterator[None]:
    """Say what can be done where torch cannot follow a model."""
    try:
        yield
    except Exception as error:
        cause = _cause(error)
        text = ANSI.sub("", str(cause)).strip()
        first = text.partition("\n")[0][:300]
        is_by_batch = checks.dynamic_batch and OF_SIZES.search(text) and "data-dependent" not in text
        advice = " A batch of one size only may do: dynamic_batch=False." if is_by_batch else ""
        raise ValueError(
            f"`model` is one that torch.export can follow, for {format}, but got {type(cause).__name__}: {first}"
            f"{advice}"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """Return what was wrong, where torch's exporter to ONNX only says which of its steps failed."""
    while error.__cause__ is not None and type(error).__module__.startswith("torch.onnx"):
        error = error.__cause__
    return error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch from telling what else could be installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
