"""Finds the members of each axis by walking the package, so that contract tests pick up a new one unasked."""

import dataclasses
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import lightning_prune.core.criteria
import lightning_prune.core.scopes
import lightning_prune.core.solvers
from lightning_prune.core import masking, regularizers, schedules
from lightning_prune.core.granularities import tensors
from lightning_prune.core.schedules import Constant, Linear

NEEDED = {  # arguments that have no default
    "Join": [{"schedules": (Linear(), Constant()), "boundaries": (0.5,), "levels": (0.5,)}],
    "Fixed": [{"sparsities": {"a*": 0.5, "*": 0.75}}],
    "Allocated": [{"curves": {"a*": {0.0: 1.0, 0.5: 1.2, 0.99: 4.0}, "*": {0.0: 1.0, 0.7: 1.5, 0.99: 3.0}}}],
}
VARIANTS = {  # settings worth a run of the laws besides the defaults
    "Polynomial": [{"power": 1.0}, {"power": 0.5}],
    "Exponential": [{"steepness": -5.0}],
    "Steps": [{"num_steps": 1}, {"num_steps": 3}],
    "Alternating": [{"num_phases": 1}, {"num_phases": 5}],
    "Magnitude": [{"p": 2.0}],
    "Random": [{"seed": 3}],
    "Slice": [{"dim": 1, "reduction": "sum"}, {"reduction": "max"}],
    "Kernel": [{"reduction": "max"}],
    "Block": [{"height": 2, "width": 3, "reduction": "max"}, {"reduction": "sum"}],
    "Local": [{"min_keep": 0.1}],
    "Global": [{"min_keep": 0.05}, {"min_keep": 0}],
    "NofM": [{"n": 1, "m": 4}, {"n": 4, "m": 8}],
    "ERK": [{"kernel": False}],
    "SparseGPT": [{"block_size": 5}],
    "WoodFisher": [{"block_size": 5}],
    "TopKAST": [{"wider": 0.5, "decay": 0.0}],
    "StraightThrough": [{"decay": 0.5}],
}


def classes(*modules: ModuleType) -> list[type]:
    """The dataclasses that the modules define themselves."""
    return [
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and dataclasses.is_dataclass(member)
    ]


def submodules(package: ModuleType) -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


AXES = {
    "schedule": classes(schedules),
    "criterion": classes(*submodules(lightning_prune.core.criteria)),
    "granularity": classes(tensors),
    "scope": classes(*submodules(lightning_prune.core.scopes)),
    "masking": classes(masking),
    "regularizer": classes(regularizers),
    "solver": classes(*submodules(lightning_prune.core.solvers)),
}


def members(axis: str) -> list[Any]:
    """An object of every class of an axis, with defaults and with the variants above."""
    return [
        cls(**settings)
        for cls in AXES[axis]
        for settings in [*NEEDED.get(cls.__name__, [{}]), *VARIANTS.get(cls.__name__, [])]
    ]
