"""What a run would do, as text in rows."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from lightning_prune.report import cost_rows, layer_rows, rows
from lightning_prune.report.data import Group
from lightning_prune.report.preview import PlannedLayer, PlannedUpdate, Preview
from lightning_prune.report.tables import MAX_LAYERS, MAX_UPDATES, Page, Table
from lightning_prune.report.text import UNKNOWN, counts, elided, percent, size


def page(preview: Preview, *, limit: bool = True) -> Page:
    """Return a preview as text in rows; `limit` leaves out the middle of long tables."""
    few, many = (MAX_UPDATES, MAX_LAYERS) if limit else (sys.maxsize, sys.maxsize)
    tables = [
        _measured(cost_rows.costs(preview.cost_before, preview.cost_after, ("now", "expected"))),
        _layers(preview.layers if preview.cost_after else (), many),  # else nothing is expected
        _groups(preview.groups, many),
        _by_reason("What stays whole", ("reason", "dims", "such as"), preview.frozen, few),
        _by_reason("Weights that are left out", ("reason", "weights", "such as"), preview.left_out, few),
        _updates(preview.updates, few),
    ]
    verdict = "nothing stands against it" if preview.is_fine else f"{len(preview.troubles)} in the way"
    return Page(
        title=f"lightning_prune: what would be {rows.DID[preview.kind]}"
        if preview.kind != "none"
        else "lightning_prune",
        facts=(*_facts(preview), ("Verdict", verdict)),
        tables=tuple(table for table in tables if table.rows),
        warnings=(
            *(f"TROUBLE: {text}" for text in preview.troubles),
            *(f"Risk: {text}" for text in preview.risks),
        ),
        notes=preview.notes,
    )


def _facts(preview: Preview) -> list[tuple[str, str]]:
    unit = "blocks" if preview.groups and preview.groups[0].role in ("block", "branch") else "weights"
    facts = [("Model", preview.model)]
    if preview.kind == "none":
        return [*facts, ("Pruning", "none")]
    if preview.targets:
        facts.append(("Targets", f"{len(preview.targets):,} {unit}, {len(preview.left_out):,} left out"))
    if preview.target_sparsity is not None:
        facts.append(("Sparsity", f"{percent(preview.target_sparsity)} in the end"))
    facts.append(("When", preview.when))
    shown = ("sparsity", "include", "exclude")
    facts += [(noun.capitalize(), text) for noun, text in preview.recipe.items() if noun not in shown]
    for noun in ("include", "exclude"):
        if preview.recipe.get(noun) not in ("None", "()", None):
            facts.append((noun.capitalize(), preview.recipe[noun]))
    return [(label, text) for label, text in facts if text not in ("None", "")]


def _measured(table: Table) -> Table:
    """Leave out what was not measured."""
    return dataclasses.replace(table, rows=tuple(row for row in table.rows if set(row[1:3]) != {UNKNOWN}))


def _layers(layers: Sequence[PlannedLayer], limit: int) -> Table:
    is_smaller = any(layer.shape != layer.shape_after for layer in layers)
    columns: dict[str, Sequence[str]] = {
        "layer": [layer.name + ("" if layer.is_target else " (not a target)") for layer in layers],
        "shape": [layer_rows.shape_text(layer.shape) for layer in layers],
    }
    if is_smaller:
        columns["expected"] = [layer_rows.shape_text(layer.shape_after) for layer in layers]
    else:
        columns["nonzero"] = counts(*(layer.nonzeros_after for layer in layers))
    columns["removed"] = [_removed(layer) for layer in layers]
    if any(layer.macs is not None for layer in layers):
        columns["MACs"] = counts(*(layer.macs_after for layer in layers))
    columns["bytes"] = [size(layer.num_bytes_after) for layer in layers]
    found = elided(list(zip(*columns.values(), strict=True)), limit)
    return Table("Layers, as expected", tuple(columns), found, spare=("shape", "bytes"))


def _removed(layer: PlannedLayer) -> str:
    if layer.nonzeros_after is None or not layer.params:
        return UNKNOWN
    return percent(max(0.0, 1.0 - layer.nonzeros_after / layer.params))


def _groups(groups: Sequence[Group], limit: int) -> Table:
    found = [(g.name, g.role, f"{g.size:,}", f"{g.kept:,}", f"{len(g.places):,}") for g in groups]
    return Table("Coupled groups", ("group", "kind", "now", "expected", "places"), elided(found, limit))


def _by_reason(title: str, columns: tuple[str, ...], reasons: Mapping[str, str], limit: int) -> Table:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    found = [(why, f"{len(names):,}", names[0]) for why, names in by_reason.items()]
    return Table(title, columns, elided(found, limit))


def _updates(updates: Sequence[PlannedUpdate], limit: int) -> Table:
    found = [
        (f"{u.step:,}", UNKNOWN if u.epoch is None else f"{u.epoch:.2f}", percent(u.requested))
        for u in updates
    ]
    return Table("Updates of the masks", ("step", "epochs done", "requested"), elided(found, limit))
