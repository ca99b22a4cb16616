"""Weights as safetensors with the record of what was cut out: written from a model, and loaded into a fresh one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.core.checks import did_you_mean
from lightning_prune.core.packing import compress, compressed_bytes, decompress
from lightning_prune.core.patterns import listed
from lightning_prune.core.types import Name
from lightning_prune.graph.plan_data import to_data
from lightning_prune.model.export.files import read_tensors, write_tensors
from lightning_prune.model.export.formats import check_installed, checked_path
from lightning_prune.model.history import KEY, plans_of
from lightning_prune.model.record import missing_plans
from lightning_prune.model.surgery import carry_out_
from lightning_prune.report.exports import Exported

BITS, VALUES, TUPLE = ".bits", ".values", "__tuple__"
M = TypeVar("M", bound=nn.Module)


def export_weights(model: nn.Module, path: str | Path, *, compressed: bool = True) -> Exported:
    """Write a model's `state_dict` as safetensors, with the record of what was cut out of it, and without pickle.

    Compressed, each tensor with enough zeros is kept as one bit for each entry and the entries that are not zero, so
    that the file shrinks with the sparsity: `NAME.bits` and `NAME.values`. Not compressed, any reader of safetensors
    finds the weights under their own names. Tied weights are kept once. `load_weights_` and `load_pruned` load both,
    equal bit for bit.

    Args:
        model: any module.
        path: of the file, which ends in ".safetensors".
        compressed: whether tensors with many zeros are compressed.

    Returns:
        The size of the file, and that of the tensors in it.

    Raises:
        ImportError: safetensors is missing: `pip install 'lightning-prune[export]'`.
        ValueError: the path has another ending, or the model holds what is no tensor with values.

    Example:
        >>> export_weights(model, "model.safetensors").num_bytes  # doctest: +SKIP
    """
    format = "compressed" if compressed else "safetensors"
    check_installed(format)
    path = checked_path(path, format)
    own, tied = untied(model.state_dict())
    tensors: dict[Name, Tensor] = {}
    packed: dict[Name, list[int]] = {}
    for name, tensor in own.items():
        if compressed and compressed_bytes(tensor) < tensor.numel() * tensor.element_size():
            packed[name] = list(tensor.shape)
            tensors[name + BITS], tensors[name + VALUES] = compress(tensor)
        else:
            tensors[name] = tensor
    if clash := sorted((set(own) - set(packed)) & {n + end for n in packed for end in (BITS, VALUES)}):
        raise ValueError(
            f"`model` has a tensor named {clash[0]!r}, which is what a part of another is named."
        )
    plans = plans_of(model)
    facts = {"packed": packed, "tied": tied, "record": to_data(plans) if plans else None}
    write_tensors(path, tensors, {**facts, "hyper_parameters": _hyper_parameters(model)})
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    return Exported(format, str(path), path.stat().st_size, state_bytes)


def load_weights_(model: nn.Module, path: str | Path) -> None:
    """Load a file of `export_weights` into a model, in place, after making it as small as the one that was written.

    All of it is done, or nothing: whatever is wrong with the file, the model stays as it was.

    Args:
        model: as its class builds it, in the dtypes of the file.
        path: of the file.

    Raises:
        ImportError: safetensors is missing.
        ValueError: the file is cut short, was changed, is newer than this version, or belongs to another model.

    Example:
        >>> load_weights_(net := build(), "model.safetensors")  # doctest: +SKIP
    """
    weights, facts = read_weights(path)
    _load_(model, weights, facts, path)


def read_weights(path: str | Path) -> tuple[dict[Name, Tensor], dict[str, Any]]:
    """Return the `state_dict` of a file, decompressed, and what else it holds.

    Raises:
        ValueError: as for `load_weights_`.
    """
    check_installed("safetensors")
    tensors, facts = read_tensors(path)
    try:
        for name, shape in facts["packed"].items():
            bits, values = tensors.pop(name + BITS), tensors.pop(name + VALUES)
            tensors[name] = decompress(name, bits, values, tuple(shape))
        tensors |= {alias: tensors[name] for alias, name in facts["tied"].items()}
    except KeyError as error:
        raise ValueError(f"`path` holds all its tensors, but got {path} without {error}.") from None
    return tensors, facts


def build_from(build: Callable[..., M], path: str | Path, **settings: Any) -> M:
    """Build a model with the hyperparameters that a file holds, and load its weights.

    Args:
        build: the class of the model.
        path: of the file.
        settings: arguments that the file does not hold, or others than it holds.

    Raises:
        ValueError: as for `load_weights_`, or an argument is missing that the file could not hold.
    """
    weights, facts = read_weights(path)
    known = facts["hyper_parameters"]
    if wanted := [name for name in known["left_out"] if name not in settings]:
        raise ValueError(
            f"`settings` hold the arguments that {path} does not, since they are no plain data, but got no "
            f"{listed(wanted)}."
        )
    model = build(**{**_from_data(known["plain"]), **settings})
    _load_(model, weights, facts, path)
    return model


def untied(state: Mapping[Name, Any]) -> tuple[dict[Name, Tensor], dict[Name, Name]]:
    """Return the tensors of a state, each once, contiguous and on the CPU, and other names -> the first name.

    Raises:
        ValueError: something is no tensor, or has no values.
    """
    own: dict[Name, Tensor] = {}
    tied: dict[Name, Name] = {}
    first: dict[Any, Name] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            what = (
                "on the meta device"
                if isinstance(tensor, Tensor) and tensor.is_meta
                else type(tensor).__name__
            )
            raise ValueError(f"`model` holds dense tensors with values, but got {what} for `{name}`.")
        where = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and where in first:
            tied[name] = first[where]
        else:
            first[where] = name
            own[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return own, tied


def _load_(model: nn.Module, weights: dict[Name, Tensor], facts: Mapping[str, Any], path: str | Path) -> None:
    checkpoint = {"state_dict": weights} | ({KEY: facts["record"]} if facts["record"] else {})
    with ExitStack() as undo:
        for plan in missing_plans(model, checkpoint):
            carry_out_(model, plan, undo)
        _check_fits(model, weights, path)
        model.load_state_dict(weights)
        undo.pop_all()


def _check_fits(model: nn.Module, weights: Mapping[Name, Tensor], path: str | Path) -> None:
    """Refuse what `load_state_dict` would refuse after it has loaded a part, or cast in silence."""
    own, kind = model.state_dict(), type(model).__name__
    if missing := [name for name in own if name not in weights]:
        near = did_you_mean(missing[0], [name for name in weights if name not in own])
        raise ValueError(
            f"`path` holds all of the model, but {path} has no {listed(missing)} of {kind}.{near}"
        )
    if strangers := [name for name in weights if name not in own]:
        raise ValueError(
            f"`path` belongs to the model, but {path} has {listed(strangers)}, which {kind} has not."
        )
    for name, tensor in own.items():
        found = weights[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ValueError(
                f"`path` belongs to the model, but in {path} `{name}` is {found.dtype} of shape {tuple(found.shape)}, "
                f"and in {kind} {tensor.dtype} of shape {tuple(tensor.shape)}."
            )


def _hyper_parameters(model: nn.Module) -> dict[str, Any]:
    """Return what a LightningModule has saved of its arguments, and the names of those that are no plain data."""
    plain, left_out = {}, []
    found = getattr(model, "hparams", None)
    for name, value in (found if isinstance(found, Mapping) else {}).items():
        try:
            plain[name] = _as_data(value)
        except TypeError:
            left_out.append(name)
    return {"plain": plain, "left_out": left_out}


def _as_data(value: Any) -> Any:
    """Return what JSON gives back as it was; tuples as an object, since JSON has lists only."""
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if type(value) in (list, tuple):
        entries = [_as_data(entry) for entry in value]
        return entries if type(value) is list else {TUPLE: entries}
    if type(value) is dict and TUPLE not in value and all(type(key) is str for key in value):
        return {key: _as_data(entry) for key, entry in value.items()}
    raise TypeError(type(value).__name__)


def _from_data(data: Any) -> Any:
    if isinstance(data, dict):
        found = {key: _from_data(entry) for key, entry in data.items()}
        return tuple(found[TUPLE]) if TUPLE in found else found
    return [_from_data(entry) for entry in data] if isinstance(data, list) else data
