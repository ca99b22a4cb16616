"""Typed Hydra schemas, made from the nouns: a setting, its type and its default are written once, in the dataclass.

Each public noun `Name` of an axis becomes the config `/lightning_prune/<axis>/Name`, from which a yaml file of
`conf/pruning/<axis>` inherits. A misspelt key or a wrong type is refused by Hydra, a value out of its range by the
noun itself (`cli.check`). Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from types import ModuleType, UnionType
from typing import Any, Union

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import lightning_prune
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.regrowth import SparseRecipe
from lightning_prune.core.rewinding import RewindingRecipe

GROUP = "lightning_prune"
AXES = {
    "schedule": "lightning_prune.core.schedules",
    "criterion": "lightning_prune.core.criteria",
    "granularity": "lightning_prune.core.granularities",
    "scope": "lightning_prune.core.scopes",
    "window": "lightning_prune.core.windows",
    "budget": "lightning_prune.core.budgets",
    "solver": "lightning_prune.core.solvers",
    "masking": "lightning_prune.core.masking",
    "regularizer": "lightning_prune.core.regularizers",
}
PRIMITIVES = (bool, int, float, str)
FOR_TYPE_CHECKERS = {"Callable": Callable, "Tensor": Any}
"""Names in annotations that the modules of the nouns do not import when they run, since torch is one of them."""


def nouns(axis: str) -> dict[str, type]:
    """Return the public dataclasses of an axis by name.

    Args:
        axis: one of `AXES`.

    Example:
        >>> list(nouns("granularity"))
        ['Channel', 'Head', 'Layer', 'Weight', 'Slice', 'Kernel', 'Block']
    """
    return {
        name: member
        for module in _modules(AXES[axis])
        for name, member in vars(module).items()
        if dataclasses.is_dataclass(member)
        and member.__module__ == module.__name__
        and name in lightning_prune.__all__
        and isinstance(member, type)
    }


def schema(noun: type, target: str, more: Mapping[str, tuple[Any, Any]] | None = None) -> type:
    """Make the dataclass that OmegaConf checks settings of `noun` against.

    Args:
        noun: a dataclass.
        target: what Hydra builds from the settings.
        more: further fields, name -> (type, default).

    Example:
        >>> from lightning_prune.core.schedules import Polynomial
        >>> schema(Polynomial, "lightning_prune.Polynomial")()
        Polynomial(_target_='lightning_prune.Polynomial', _convert_='all', power=3.0)
    """
    types = typing.get_type_hints(noun, localns=FOR_TYPE_CHECKERS)
    fields: dict[str, tuple[Any, Any]] = {"_target_": (str, target), "_convert_": (str, "all")}
    fields |= {f.name: (_checked_type(types[f.name]), _default(f)) for f in dataclasses.fields(noun)}
    fields |= more or {}
    return make_dataclass(
        target.rpartition(".")[2],
        [(name, kind, _as_field(default)) for name, (kind, default) in fields.items()],
    )


PRUNING: dict[str, tuple[type, str, dict[str, tuple[Any, Any]]]] = {
    "train_time": (
        Recipe,
        "lightning_prune.TrainTimePruning",
        {
            "schedule": (Any, MISSING),
            "window": (Any, MISSING),
            "report": (bool, True),
            "compact": (bool, True),
            "shrink": (Any, None),
            "masking": (Any, None),
            "regularizer": (Any, None),
        },
    ),
    "initial": (
        Recipe,
        "lightning_prune.InitialPruning",
        {
            "num_calibration_batches": (int, 4),
            "num_rounds": (int, 1),
            "revive": (bool, False),
            "report": (bool, True),
            "compact": (bool, True),
            "shrink": (Any, None),
            "unfinished": (Any, None),
        },
    ),
    "sparse_training": (
        SparseRecipe,
        "lightning_prune.SparseTraining",
        {
            "schedule": (Any, MISSING),
            "window": (Any, MISSING),
            "report": (bool, True),
            "compact": (bool, True),
        },
    ),
    "rewinding": (
        RewindingRecipe,
        "lightning_prune.WeightRewinding",
        {"report": (bool, True), "compact": (bool, True)},
    ),
    "post_training": (
        Recipe,
        "lightning_prune.PostTrainingPruning",
        {
            "checkpoint": (str, "last"),
            "num_calibration_batches": (int, 16),
            "num_rounds": (int, 1),
            "reestimate_batch_norm": (bool, False),
            "report": (bool, True),
            "solver": (Any, None),
            "blocks": (Any, None),
            "unfinished": (Any, None),
        },
    ),
}
"""The callbacks by name: their recipe, what Hydra builds, and the settings that they have beside the recipe's."""


def register() -> None:
    """Put all schemas into Hydra's config store."""
    store = ConfigStore.instance()
    for axis in AXES:
        for name, noun in nouns(axis).items():
            node = schema(noun, f"lightning_prune.{name}")
            store.store(group=f"{GROUP}/{axis}", name=name, node=node, provider=GROUP)
    for name, (recipe, target, more) in PRUNING.items():
        store.store(group=GROUP, name=name, node=schema(recipe, target, more), provider=GROUP)


def _modules(name: str) -> list[ModuleType]:
    """Import a module, or all modules of a package."""
    module = importlib.import_module(name)
    found = pkgutil.iter_modules(module.__path__) if hasattr(module, "__path__") else []
    return [module, *(importlib.import_module(f"{name}.{info.name}") for info in found)]


def _checked_type(hint: Any) -> Any:
    """Translate a type into one that OmegaConf can check; what it cannot, is left to the noun."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in PRIMITIVES:
        return hint
    if origin in (Union, UnionType) and all(argument in PRIMITIVES for argument in arguments):
        return Union[arguments]  # noqa: UP007
    if origin is tuple:
        return list[_checked_type(arguments[0])]  # type: ignore[misc]
    return Any


def _default(setting: dataclasses.Field[Any]) -> Any:
    """Return the default, or MISSING where there is none or another group of `conf/pruning` sets it."""
    return MISSING if setting.default is dataclasses.MISSING else setting.default


def _as_field(default: Any) -> Any:
    """Make a field of a default that may be a tuple, which OmegaConf takes as a list."""
    return (
        field(default_factory=lambda: list(default)) if isinstance(default, tuple) else field(default=default)
    )
