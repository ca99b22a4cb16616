"""Which strategies masks hold under; the others are refused before anything is trained."""

from __future__ import annotations

from typing import ClassVar, Protocol

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.recipe import Recipe
from lightning_prune.core.types import BY_ROWS, Couples
from lightning_prune.model.statistics import ACTIVATIONS


class Sharding(Protocol):
    """What a pruning callback says of itself."""

    can_shard: ClassVar[bool]
    recipe: Recipe


def check_strategy(strategy: Strategy, callback: Sharding) -> None:
    """Refuse a strategy under which masks would be lost, or which a callback cannot do.

    Raises:
        ValueError: FSDP of the first kind or DeepSpeed; weights that are sharded where they have to be whole.
    """
    kind = type(strategy).__name__
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            "`strategy` is one under which weights keep their shapes (one device, DDP, ModelParallelStrategy), but got "
            f"{kind}, which flattens them into buffers of its own: masks would be lost. Train with strategy='ddp', or "
            "shard with ModelParallelStrategy and torch's fully_shard (FSDP2) in configure_model."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if isinstance(callback.recipe.granularity, Couples):
        raise ValueError(
            f"`granularity` is one of single tensors under {kind}, such as Weight(), but got "
            f"{callback.recipe.granularity}: what is coupled across layers needs whole weights. Train with "
            "strategy='ddp', or shrink the model after training."
        )
    activations = set(required_statistics(callback.recipe.criterion)) & set(ACTIVATIONS)
    mesh = strategy._device_mesh
    if activations and mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "`criterion` reads weights or gradients under tensor parallelism, where no process sees whole activations, "
            f"but got {callback.recipe.criterion}, which reads {sorted(activations)}. Use tensor_parallel_size=1."
        )
    masking = getattr(callback, "masking", None)
    if masking is not None and not getattr(masking, BY_ROWS, False):
        raise ValueError(
            f"`masking` turns each weight's gradient by itself under {kind}, as StraightThrough does, but got "
            f"{masking}, which may compare weights of other processes. Use strategy='ddp'."
        )
    if not callback.can_shard:
        raise ValueError(
            f"`strategy` keeps whole weights on each process for {type(callback).__name__} (one device, DDP), but got "
            f"{kind}, which shards them. Use strategy='ddp', or TrainTimePruning."
        )
