"""What a run is expected to leave of each layer, and which layers that puts at risk."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_prune.model.depth_pruning import DepthPruner
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.preview import Expected
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.shortfall import thin_groups
from lightning_prune.model.shrinking import AnyPruner
from lightning_prune.report.preview import PlannedLayer

THIN = 0.01  # of a layer's weights: as little as `CollapseGuard` lets none have


def planned_layers(model: nn.Module, expected: Expected) -> tuple[PlannedLayer, ...]:
    """Return all weights before and after, those of blocks that would go with nothing left.

    Args:
        model: as it is now.
        expected: what came of a copy.
    """
    after = {layer.name: layer for layer in expected.after.layers} if expected.after else {}
    targets = set(expected.pruner.targets) if expected.pruner else set()
    width = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    gone = _gone(expected.pruner)
    layers = []
    for layer in expected.before.layers:
        end = after.get(layer.name)
        is_gone = end is None and layer.name.startswith(gone) and expected.after is not None
        params = end.params if end else 0 if is_gone else layer.params
        layers.append(
            PlannedLayer(
                name=layer.name,
                is_target=layer.name in targets or is_gone,
                shape=layer.shape,
                shape_after=end.shape if end else () if is_gone else layer.shape,
                params=layer.params,
                params_after=params,
                nonzeros_after=end.nonzeros if end else 0 if is_gone else None,
                macs=layer.macs,
                macs_after=end.macs if end else 0 if is_gone else None,
                num_bytes=layer.params * width[layer.name],
                num_bytes_after=params * width[layer.name],
            )
        )
    return tuple(layers)


def _gone(pruner: AnyPruner | None) -> tuple[str, ...]:
    return tuple(f"{path}." for path in pruner.skipped) if isinstance(pruner, DepthPruner) else ()


def risks_of(layers: Sequence[PlannedLayer], expected: Expected) -> list[str]:
    """Name the layers of which so little would be left that they may not carry a signal."""
    if isinstance(expected.pruner, GroupPruner):
        return [
            f"`{name}` would keep {kept:,} of {whole:,} {_plural(expected.pruner, name)}: raise `min_keep`."
            for name, kept, whole in thin_groups(expected.pruner)
        ]
    if not isinstance(expected.pruner, Pruner):
        return []
    found = []
    for layer in layers:
        if not layer.is_target or layer.nonzeros_after is None or layer.nonzeros_after == layer.params_after:
            continue
        kept_weights, outputs = layer.nonzeros_after, layer.shape_after[0]
        if kept_weights < max(outputs, THIN * layer.params_after):
            less = "fewer than it has outputs" if kept_weights < outputs else f"less than {THIN:.0%}"
            found.append(
                f"`{layer.name}` would keep {kept_weights:,} of {layer.params_after:,} weights, {less}: "
                "raise `min_keep`, take `scope=ERK()` or `LAMP()`, or add a CollapseGuard."
            )
    return found


def _plural(pruner: GroupPruner, name: str) -> str:
    group = pruner.couplings.groups.get(name)
    return {"head": "heads", "head_dim": "widths of its heads"}.get(group.role if group else "", "channels")
