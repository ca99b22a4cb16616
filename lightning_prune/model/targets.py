"""Which parameters are pruned."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from lightning_prune.core.patterns import check_match, listed, matches
from lightning_prune.core.types import Name
from lightning_prune.model.layouts import is_transformers_conv1d, output_dim
from lightning_prune.model.plain import is_plain

Pattern: TypeAlias = str | type[nn.Module]

DEFAULT_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd, nn.MultiheadAttention)
FROZEN = "it is frozen"
NORMS = (_NormBase, nn.LayerNorm, nn.RMSNorm)  # a LayerNorm over several dims has a scale of several dims


@dataclass(frozen=True)
class _Candidate:
    """A parameter that could be pruned: all its names (tied weights have several) and the modules that own it."""

    parameter: nn.Parameter
    names: tuple[Name, ...]
    owners: tuple[nn.Module, ...]

    def matches(self, pattern: Pattern) -> bool:
        if isinstance(pattern, str):
            return any(matches(pattern, name) for name in self.names)
        return any(isinstance(owner, pattern) for owner in self.owners)

    @property
    def is_default(self) -> bool:
        is_known = all(isinstance(o, DEFAULT_TYPES) or is_transformers_conv1d(o) for o in self.owners)
        return is_known and not self.is_normed

    @property
    def is_normed(self) -> bool:
        """Whether it is a direction or a length by `torch.nn.utils.weight_norm`: without any, both are not defined."""
        return self._is_of_weight_norm("_g", "_v")

    @property
    def is_direction(self) -> bool:
        """Whether a norm of its rows is divided by, which a row of zeros does not have."""
        is_parametrized = any(
            isinstance(owner, ParametrizationList) and isinstance(owner[0], _WeightNorm)
            for owner in self.owners
        )
        return self._is_of_weight_norm("_v") or (is_parametrized and self.names[0].endswith(".original1"))

    def _is_of_weight_norm(self, *ends: str) -> bool:
        keys = {name.rpartition(".")[2] for name in self.names}
        return any(
            f"{hook.name}{end}" in keys
            for owner in self.owners
            for hook in owner._forward_pre_hooks.values()
            if isinstance(hook, WeightNorm)
            for end in ends
        )


def select_targets(
    model: nn.Module,
    *,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
    trained: Container[int] | None = None,
) -> dict[Name, nn.Parameter]:
    """Return the parameters to prune by name, in the order of the model; tied weights once, by their first name.

    Candidates are dense floating-point parameters, of 16 bits or more, of at least two dims: never a bias or the scale
    of a norm. By default the weights of linear and convolution layers and of attention projections are taken, the
    output layer among them (`exclude=["head"]` leaves yours out); embeddings, recurrent layers and what weights are
    computed from (`weight_norm`, `torch.nn.utils.parametrizations`) are not (`include=[nn.Embedding, ...]`).

    Args:
        model: any module.
        include: what to take instead of the default. Each entry is a glob on the parameter's name or on a module
            path above it ("encoder", "*.attn.*"), a regular expression after "re:", or a module type.
        exclude: what to leave out; it wins over `include`.
        trained: ids of the parameters that are being trained; without `include`, only these are taken.

    Raises:
        ValueError: an entry matches nothing, nothing is left to prune, a lazy parameter has no shape yet, or `include`
            names a direction of `weight_norm`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
        >>> list(select_targets(net, exclude=["2"]))
        ['0.weight']
    """
    candidates = _candidates(model)
    for argument, patterns in (("include", include or ()), ("exclude", exclude)):
        _check_matches(argument, patterns, candidates)

    def is_chosen(candidate: _Candidate) -> bool:
        if any(candidate.matches(p) for p in exclude):
            return False
        if include is not None:
            return any(candidate.matches(p) for p in include)
        return candidate.is_default and (trained is None or id(candidate.parameter) in trained)

    chosen = {name: candidate.parameter for name, candidate in candidates.items() if is_chosen(candidate)}
    if directions := [name for name in chosen if candidates[name].is_direction]:
        raise ValueError(
            f"`include` names weights that may lose whole rows, but got {listed(directions, num_shown=3)}, whose rows "
            "weight_norm divides by their norms: remove weight_norm (torch.nn.utils.parametrize."
            "remove_parametrizations, torch.nn.utils.remove_weight_norm), or leave the layer out by `exclude`."
        )
    if not chosen:
        spared = computed_layers(model, (), exclude) if include is None else []
        raise ValueError(
            f"`include` and `exclude` leave nothing to prune in {type(model).__name__}: include={include!r}, "
            f"exclude={exclude!r}. {f'{said_of_computed(spared)} ' if spared else ''}The candidates, parameters of at "
            f"least two dims, are {listed(candidates) or 'none'}."
        )
    return chosen


def computed_layers(model: nn.Module, targets: Container[Name], exclude: Sequence[Pattern] = ()) -> list[str]:
    """Return the paths of linear, convolution and attention layers whose weight is computed from what is no target.

    Example:
        >>> net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear(3, 4))
        >>> computed_layers(net, select_targets(net))
        ['0']
    """
    spared: dict[str, bool] = {}
    for name, candidate in _candidates(model).items():
        path, inside, _ = f".{name}".partition(".parametrizations.")
        path = path[1:] if inside else name.rpartition(".")[0]
        if candidate.is_normed or (inside and isinstance(model.get_submodule(path), DEFAULT_TYPES)):
            is_said = name in targets or any(candidate.matches(pattern) for pattern in exclude)
            spared[path] = spared.get(path, True) and not is_said
    return [path for path, is_spared in spared.items() if is_spared]


def said_of_computed(paths: Sequence[str]) -> str:
    """Say why computed layers are no targets, and what to do.

    Example:
        >>> said_of_computed(["0"])
        'The weights of `0` are computed from others, by weight_norm or a parametrization: remove that, or, but ...
    """
    return (
        f"The weights of {listed((f'`{path}`' for path in paths), num_shown=5)} are computed from others, by "
        "weight_norm or a parametrization: remove that, or, but for weight_norm, name what they are computed from in "
        "`include`."
    )


def check_values(targets: Mapping[Name, nn.Parameter]) -> None:
    """Refuse weights that have no values, or none of their own, so that they could not be masked one by one.

    Raises:
        ValueError: one on the meta device, one whose entries share memory, or two that do.
    """
    places: dict[int, list[tuple[int, int, Name]]] = {}
    for name, parameter in targets.items():
        if parameter.is_meta:
            raise ValueError(
                f"`{name}` is on the meta device, without values: load or initialise the model first."
            )
        strides = zip(parameter.stride(), parameter.shape, strict=True)
        if any(stride == 0 and size > 1 for stride, size in strides):
            raise ValueError(f"`{name}` has entries that share memory, as `expand` makes them: clone it.")
        if type(parameter) is nn.Parameter and parameter.is_contiguous():
            start = parameter.data_ptr()
            end = start + parameter.numel() * parameter.element_size()
            places.setdefault(parameter.untyped_storage().data_ptr(), []).append((start, end, name))
    for found in places.values():
        for (_, end, first), (start, _, second) in pairwise(sorted(found)):
            if start < end:
                raise ValueError(
                    f"`{first}` and `{second}` are two parameters that share memory: let both modules hold the same "
                    "one, or clone it."
                )


def output_dims(model: nn.Module) -> dict[Name, set[int]]:
    """Return along which dims of each weight its outputs lie; of a tied weight, those of all layers that hold it.

    Example:
        >>> output_dims(nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)))
        {'0.weight': {1}, '1.weight': {0}}
    """
    return {name: {output_dim(o) for o in found.owners} for name, found in _candidates(model).items()}


def spared_outputs(
    model: nn.Module,
    chosen: Container[Name],
    *,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
    trained: Container[int] | None = None,
) -> dict[Name, set[int]]:
    """Return the weights whose outputs stay: those that `exclude` leaves out, and with `include` all but the chosen.

    Without `include` those of layers that are not trained stay, too.

    Args:
        model: any module.
        chosen: what `select_targets` returns for the others, which mean the same there.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3).requires_grad_(False), nn.Linear(3, 4))
        >>> spared_outputs(net, ["1.weight"], trained={id(net[1].weight)})
        {'0.weight': {0}}
    """

    def is_spared(name: Name, candidate: _Candidate) -> bool:
        if include is not None:
            return name not in chosen
        is_frozen = trained is not None and candidate.is_default and id(candidate.parameter) not in trained
        return is_frozen or any(candidate.matches(pattern) for pattern in exclude)

    dims = output_dims(model)
    return {name: dims[name] for name, candidate in _candidates(model).items() if is_spared(name, candidate)}


def _candidates(model: nn.Module) -> dict[Name, _Candidate]:
    names: dict[int, list[Name]] = {}
    owners: dict[int, list[nn.Module]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{key}" if path else key
            if is_lazy(parameter):
                raise ValueError(
                    f"`{name}` is a lazy parameter without a shape: run one batch through the model first."
                )
            if _is_candidate(module, key, parameter):
                parameters[id(parameter)] = parameter
                names.setdefault(id(parameter), []).append(name)
                owners.setdefault(id(parameter), []).append(module)
    return {names[i][0]: _Candidate(p, tuple(names[i]), tuple(owners[i])) for i, p in parameters.items()}


def _is_candidate(module: nn.Module, key: str, parameter: Tensor) -> bool:
    is_bias = key.startswith("bias")  # those of an attention have three dims
    is_spared = is_bias or isinstance(module, NORMS)
    is_dense = parameter.is_floating_point() and parameter.layout is torch.strided and is_plain(parameter)
    is_dense = is_dense and parameter.element_size() > 1  # there is no arithmetic for floats of 8 bits
    return parameter.dim() >= 2 and parameter.numel() > 0 and is_dense and not is_spared


def _check_matches(argument: str, patterns: Sequence[Pattern], candidates: Mapping[Name, _Candidate]) -> None:
    for pattern in patterns:
        _check_pattern(argument, pattern, candidates)


def _check_pattern(argument: str, pattern: Pattern, candidates: Mapping[Name, _Candidate]) -> None:
    if any(c.matches(pattern) for c in candidates.values()):
        return
    if isinstance(pattern, str):
        check_match(argument, pattern, candidates)
    known = sorted({type(owner).__name__ for c in candidates.values() for owner in c.owners})
    raise ValueError(
        f"`{argument}` has a type that no weight belongs to: {pattern!r}. The types are {listed(known)}."
    )


def unmatched(model: nn.Module, patterns: Mapping[str, Sequence[Pattern]]) -> list[str]:
    """Return what is to be said of each pattern that matches no weight: all of them, not the first one only.

    Args:
        model: any module.
        patterns: argument ("include", "exclude") -> its patterns or module types.

    Example:
        >>> unmatched(nn.Linear(2, 3), {"exclude": ["wieght"]})
        ["`exclude` has a pattern that matches no weight: 'wieght'. Did you mean weight? The candidates are weight."]
    """
    candidates, found = _candidates(model), []
    for argument, pattern in ((name, entry) for name, entries in patterns.items() for entry in entries):
        try:
            _check_pattern(argument, pattern, candidates)
        except ValueError as error:
            found.append(str(error))
    return found


def reasons_left_out(
    model: nn.Module,
    *,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
    trained: Container[int] | None = None,
) -> dict[Name, str]:
    """Return why each weight of at least two dims is no target, by the arguments of `select_targets`.

    Example:
        >>> reasons_left_out(nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)), exclude=["1"])
        {'0.weight': 'Embedding is pruned only where `include` names it', '1.weight': "`exclude` names it: '1'"}
    """
    reasons: dict[Name, str] = {}
    for name, candidate in _candidates(model).items():
        excluding = [pattern for pattern in exclude if candidate.matches(pattern)]
        if excluding:
            reasons[name] = f"`exclude` names it: {excluding[0]!r}"
        elif include is not None:
            if not any(candidate.matches(pattern) for pattern in include):
                reasons[name] = "`include` does not name it"
        elif not candidate.is_default:
            kinds = dict.fromkeys(type(owner).__name__ for owner in candidate.owners)
            kind = "a weight by `weight_norm`" if candidate.is_normed else ", ".join(kinds)
            reasons[name] = f"{kind} is pruned only where `include` names it"
        elif trained is not None and id(candidate.parameter) not in trained:
            reasons[name] = FROZEN
    return reasons
