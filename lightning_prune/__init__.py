"""The pruning suite for PyTorch Lightning.

Everything public is here: `from lightning_prune import TrainTimePruning`. Names are loaded when they are first
used, so importing the package imports neither torch nor lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.callbacks.distillation import Distillation as Distillation
    from lightning_prune.callbacks.files import AtomicCheckpointIO as AtomicCheckpointIO
    from lightning_prune.callbacks.guard import CollapseGuard as CollapseGuard
    from lightning_prune.callbacks.initial import InitialPruning as InitialPruning
    from lightning_prune.callbacks.monitor import SparsityMonitor as SparsityMonitor
    from lightning_prune.callbacks.post_training import PostTrainingPruning as PostTrainingPruning
    from lightning_prune.callbacks.preview import preview as preview
    from lightning_prune.callbacks.rewinding import WeightRewinding as WeightRewinding
    from lightning_prune.callbacks.selection import SparseEarlyStopping as SparseEarlyStopping
    from lightning_prune.callbacks.selection import SparseModelCheckpoint as SparseModelCheckpoint
    from lightning_prune.callbacks.sparse_training import SparseTraining as SparseTraining
    from lightning_prune.callbacks.train_time import TrainTimePruning as TrainTimePruning
    from lightning_prune.core.budgets import Budget as Budget
    from lightning_prune.core.criteria.activations import ActivationVariance as ActivationVariance
    from lightning_prune.core.criteria.activations import APoZ as APoZ
    from lightning_prune.core.criteria.activations import BatchNormScale as BatchNormScale
    from lightning_prune.core.criteria.activations import MeanActivation as MeanActivation
    from lightning_prune.core.criteria.activations import Wanda as Wanda
    from lightning_prune.core.criteria.curvature import OBD as OBD
    from lightning_prune.core.criteria.curvature import GraSP as GraSP
    from lightning_prune.core.criteria.curvature import SecondOrderTaylor as SecondOrderTaylor
    from lightning_prune.core.criteria.curvature import SynFlow as SynFlow
    from lightning_prune.core.criteria.gradients import Fisher as Fisher
    from lightning_prune.core.criteria.gradients import GradientMagnitude as GradientMagnitude
    from lightning_prune.core.criteria.gradients import MeanGradient as MeanGradient
    from lightning_prune.core.criteria.gradients import Movement as Movement
    from lightning_prune.core.criteria.gradients import Saliency as Saliency
    from lightning_prune.core.criteria.gradients import Taylor as Taylor
    from lightning_prune.core.criteria.weights import GeometricMedian as GeometricMedian
    from lightning_prune.core.criteria.weights import Magnitude as Magnitude
    from lightning_prune.core.criteria.weights import Random as Random
    from lightning_prune.core.granularities import Block as Block
    from lightning_prune.core.granularities import Channel as Channel
    from lightning_prune.core.granularities import Head as Head
    from lightning_prune.core.granularities import Kernel as Kernel
    from lightning_prune.core.granularities import Layer as Layer
    from lightning_prune.core.granularities import Slice as Slice
    from lightning_prune.core.granularities import Weight as Weight
    from lightning_prune.core.masking import Dormant as Dormant
    from lightning_prune.core.masking import StraightThrough as StraightThrough
    from lightning_prune.core.masking import TopKAST as TopKAST
    from lightning_prune.core.regularizers import GroupDecay as GroupDecay
    from lightning_prune.core.regularizers import GroupLasso as GroupLasso
    from lightning_prune.core.schedules import Alternating as Alternating
    from lightning_prune.core.schedules import Constant as Constant
    from lightning_prune.core.schedules import Cosine as Cosine
    from lightning_prune.core.schedules import Exponential as Exponential
    from lightning_prune.core.schedules import Join as Join
    from lightning_prune.core.schedules import Linear as Linear
    from lightning_prune.core.schedules import OneCycle as OneCycle
    from lightning_prune.core.schedules import Polynomial as Polynomial
    from lightning_prune.core.schedules import Steps as Steps
    from lightning_prune.core.scopes.allocations import ERK as ERK
    from lightning_prune.core.scopes.allocations import ConstantFanIn as ConstantFanIn
    from lightning_prune.core.scopes.allocations import Fixed as Fixed
    from lightning_prune.core.scopes.curves import Allocated as Allocated
    from lightning_prune.core.scopes.curves import allocate as allocate
    from lightning_prune.core.scopes.outliers import OWL as OWL
    from lightning_prune.core.scopes.patterns import NofM as NofM
    from lightning_prune.core.scopes.rankings import LAMP as LAMP
    from lightning_prune.core.scopes.rankings import Global as Global
    from lightning_prune.core.scopes.rankings import Isomorphic as Isomorphic
    from lightning_prune.core.scopes.rankings import Local as Local
    from lightning_prune.core.scopes.rankings import PerRow as PerRow
    from lightning_prune.core.solvers.combinatorial import ALPS as ALPS
    from lightning_prune.core.solvers.curvature import WoodFisher as WoodFisher
    from lightning_prune.core.solvers.surgery import LeastSquares as LeastSquares
    from lightning_prune.core.solvers.surgery import SparseGPT as SparseGPT
    from lightning_prune.core.windows import Window as Window
    from lightning_prune.model.acceleration import accelerate as accelerate
    from lightning_prune.model.acceleration import to_semi_structured as to_semi_structured
    from lightning_prune.model.export.programs import export_onnx as export_onnx
    from lightning_prune.model.export.programs import export_program as export_program
    from lightning_prune.model.export.weights import export_weights as export_weights
    from lightning_prune.model.export.weights import load_weights_ as load_weights_
    from lightning_prune.model.one_shot import prune as prune
    from lightning_prune.model.record import ReplaysRecord as ReplaysRecord
    from lightning_prune.model.record import load_pruned as load_pruned
    from lightning_prune.model.sensitivity import sensitivity as sensitivity
    from lightning_prune.model.shrinking import shrink as shrink
    from lightning_prune.model.sparse import SparseLinear as SparseLinear
    from lightning_prune.model.sparse import densify as densify

_HOMES = {
    "callbacks.distillation": ("Distillation",),
    "callbacks.files": ("AtomicCheckpointIO",),
    "callbacks.guard": ("CollapseGuard",),
    "callbacks.initial": ("InitialPruning",),
    "callbacks.monitor": ("SparsityMonitor",),
    "callbacks.post_training": ("PostTrainingPruning",),
    "callbacks.preview": ("preview",),
    "callbacks.rewinding": ("WeightRewinding",),
    "callbacks.selection": ("SparseEarlyStopping", "SparseModelCheckpoint"),
    "callbacks.sparse_training": ("SparseTraining",),
    "callbacks.train_time": ("TrainTimePruning",),
    "core.criteria.activations": ("APoZ", "ActivationVariance", "BatchNormScale", "MeanActivation", "Wanda"),
    "core.criteria.curvature": ("OBD", "GraSP", "SecondOrderTaylor", "SynFlow"),
    "core.criteria.gradients": (
        "Fisher",
        "GradientMagnitude",
        "MeanGradient",
        "Movement",
        "Saliency",
        "Taylor",
    ),
    "core.criteria.weights": ("GeometricMedian", "Magnitude", "Random"),
    "core.budgets": ("Budget",),
    "core.granularities": ("Block", "Channel", "Head", "Kernel", "Layer", "Slice", "Weight"),
    "core.masking": ("Dormant", "StraightThrough", "TopKAST"),
    "core.regularizers": ("GroupDecay", "GroupLasso"),
    "core.schedules": (
        "Alternating",
        "Constant",
        "Cosine",
        "Exponential",
        "Join",
        "Linear",
        "OneCycle",
        "Polynomial",
        "Steps",
    ),
    "core.scopes.allocations": ("ERK", "ConstantFanIn", "Fixed"),
    "core.scopes.curves": ("Allocated", "allocate"),
    "core.scopes.outliers": ("OWL",),
    "core.scopes.patterns": ("NofM",),
    "core.scopes.rankings": ("LAMP", "Global", "Isomorphic", "Local", "PerRow"),
    "core.solvers.combinatorial": ("ALPS",),
    "core.solvers.curvature": ("WoodFisher",),
    "core.solvers.surgery": ("LeastSquares", "SparseGPT"),
    "core.windows": ("Window",),
    "model.acceleration": ("accelerate", "to_semi_structured"),
    "model.export.programs": ("export_onnx", "export_program"),
    "model.export.weights": ("export_weights", "load_weights_"),
    "model.one_shot": ("prune",),
    "model.record": ("ReplaysRecord", "load_pruned"),
    "model.sensitivity": ("sensitivity",),
    "model.shrinking": ("shrink",),
    "model.sparse": ("SparseLinear", "densify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def nouns() -> tuple[str, ...]:
    """Return the names of all nouns: the classes that the ground floor makes public."""
    return tuple(name for name, home in _HOME_OF.items() if home.startswith("core.") and name[0].isupper())


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
