"""What a report says of each layer, as text in rows."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune.report.data import Layer, Report
from lightning_prune.report.tables import Table
from lightning_prune.report.text import UNKNOWN, counts, elided, percent


def changed_layers(layers: Sequence[Layer], limit: int) -> Table:
    """Return the pruned weights as the run leaves them, those in the middle left out beyond a limit."""
    columns: dict[str, Sequence[str]] = {
        "layer": [layer.name for layer in layers],
        "shape": [shape_text(layer.shape) for layer in layers],
        "nonzero": counts(*(layer.nonzeros for layer in layers)),
        "sparsity": [percent(layer.sparsity) for layer in layers],
    }
    if any(layer.num_groups is not None for layer in layers):
        columns["groups kept"] = [_kept(layer) for layer in layers]
    if any(None not in (x.macs_before, x.macs_after) and x.macs_before != x.macs_after for x in layers):
        columns["MACs before"] = counts(*(layer.macs_before for layer in layers))
    if any(layer.macs_after is not None for layer in layers):
        columns["MACs"] = counts(*(layer.macs_after for layer in layers))
    rows, spare = (
        elided(list(zip(*columns.values(), strict=True)), limit),
        ("MACs before", "shape", "nonzero"),
    )
    return Table("Layers", tuple(columns), rows, spare=tuple(name for name in spare if name in columns))


def all_layers(report: Report) -> Table:
    """Return all pruned weights in full: shape, entries, zeros and work before and after."""
    dense = {layer.name: layer for layer in report.cost_before.layers} if report.cost_before else {}
    old = [dense.get(layer.name) for layer in report.layers]
    columns: dict[str, Sequence[str]] = {
        "layer": [layer.name for layer in report.layers],
        "shape before": [shape_text(cost.shape) if cost else UNKNOWN for cost in old],
        "shape": [shape_text(layer.shape) for layer in report.layers],
        "weights before": counts(*(cost.params if cost else None for cost in old)),
        "weights": counts(*(layer.params for layer in report.layers)),
        "nonzero before": counts(*(cost.nonzeros if cost else None for cost in old)),
        "nonzero": counts(*(layer.nonzeros for layer in report.layers)),
        "sparsity": [percent(layer.sparsity) for layer in report.layers],
    }
    if columns["nonzero before"] in (columns["weights before"], columns["weights"]):  # none was zero
        del columns["nonzero before"]
    if columns["shape"] == columns["shape before"]:
        del columns["shape before"], columns["weights before"]
    if any(layer.num_groups is not None for layer in report.layers):
        columns["kept"] = [_kept(layer) for layer in report.layers]
    if any(layer.macs_before is not None for layer in report.layers):
        columns["MACs before"] = counts(*(layer.macs_before for layer in report.layers))
    if any(layer.macs_after is not None for layer in report.layers):
        columns["MACs"] = counts(*(layer.macs_after for layer in report.layers))
    return Table("", tuple(columns), tuple(zip(*columns.values(), strict=True)))


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as text."""
    return " x ".join(map(str, shape))


def _kept(layer: Layer) -> str:
    return UNKNOWN if layer.num_groups is None else " of ".join(counts(layer.num_kept, layer.num_groups))
