"""What a report says, as text in rows: terminal and markdown show the same page, and only differ in how."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.report.costs import Acceleration, Cost, Latency, LayerKernel, differs
from lightning_prune.report.data import Layer, Report
from lightning_prune.report.text import UNKNOWN, change, counts, elided, number, percent, size

MAX_LAYERS = 40
MAX_UPDATES = 10
MAX_METRICS = 4  # side by side; report.json holds them all
DID = {
    "train_time": "pruned while training",
    "post_training": "pruned after training",
    "initial": "pruned before training",
    "sparse_training": "trained sparse",
    "rewinding": "pruned between trainings",
    "none": "nothing was pruned",
}
LABELS = {
    "params": "Parameters",
    "nonzeros": "Nonzeros",
    "macs": "MACs",
    "effective_macs": "Effective MACs",
    "num_bytes": "File (state_dict)",
    "gzip_bytes": "File after gzip",
    "latency": "Latency",
}
PATHS = {"Checkpoint": "checkpoint", "Resume": "resume_command", "Load": "load_command"}
ZEROS = (
    "Zeros are stored and multiplied like any other number: by themselves they make no model faster and no file "
    "smaller. That takes smaller layers, a compressed format, or a kernel made for zeros."
)
CHANNELS = (
    "Half of the channels are not half of the model: a layer that loses inputs and outputs keeps a quarter of its "
    "weights, and early layers hold few weights but much of the work. The costs above are what counts; a budget asks "
    "for them."
)
GZIP = "The file after gzip shows how much a compressed format could save."
KERNELS = (
    "The sparse kernels were measured, not used: `accelerate(model, example)` converts the layers that are faster, on "
    "the machine and for the batch size that it is called with."
)
EFFECTIVE = (
    "Effective MACs are what a kernel that skips every zero would have left; no ordinary kernel skips them."
)


@dataclass(frozen=True)
class Table:
    """A table of text: the first column names, the others hold numbers. A page may sort it by any of them.

    `spare` are columns that a narrow terminal leaves out, the first ones first.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_sortable: bool = False
    spare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A report as it is shown: facts (label, text), tables, warnings, notes."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def page(report: Report, *, limit: bool = True) -> Page:
    """Return all that a report says.

    Args:
        report: of a run.
        limit: whether the middle of long tables is left out.
    """
    before, after = report.cost_before, report.cost_after
    few, many = (MAX_UPDATES, MAX_LAYERS) if limit else (sys.maxsize, sys.maxsize)
    tables = [
        costs(before, after),
        _metrics(report),
        _layers(report.layers, many),
        kernels(report.acceleration, many),
        _frozen(report, few),
        _updates(report, few),
        _evaluations(report, few),
    ]
    return Page(
        title=f"lightning_prune: {DID[report.kind]}",
        facts=_facts(report),
        tables=tuple(table for table in tables if table.rows),
        warnings=report.warnings,
        notes=_notes(report),
    )


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    achieved, target = report.achieved_sparsity, report.target_sparsity
    facts = []
    if achieved is not None or target is not None:
        asked = "" if target is None else f" of the {unit(report)} (asked for: {percent(target)})"
        facts.append(("Sparsity", f"{percent(achieved)}{asked}"))
    if report.equivalence_error is not None:
        proof = (
            f"differs from the masked model by {report.equivalence_error:.1e} at most, relative, in float64"
        )
        facts.append(("Small model", proof))
    if report.updates:
        last = report.updates[-1]
        facts.append(("Updates", f"{len(report.updates)}, the last after step {last.step:,}"))
    told = {label.lower() for label, _ in facts}
    nouns = {
        noun: text
        for noun, text in report.recipe.items()
        if noun not in told and text not in ("None", "()", "")
    }
    facts += [(noun.capitalize(), text) for noun, text in nouns.items()]
    paths = {label: getattr(report, name) for label, name in PATHS.items()}
    return (*facts, *((label, text) for label, text in paths.items() if text))


def unit(report: Report) -> str:
    """Return what sparsity is the fraction of."""
    text = report.recipe.get("granularity", "")
    kind = "Branch" if "unit='branch'" in text else text.partition("(")[0]
    return {"Branch": "branches", "Channel": "channels", "Head": "heads", "Layer": "blocks"}.get(
        kind, "pruned weights"
    )


def costs(before: Cost | None, after: Cost | None, names: tuple[str, str] = ("before", "after")) -> Table:
    """Return what a model costs before and after; `names` are the columns of the two."""
    shown = [cost for cost in (before, after) if cost is not None]
    sizes = {cost.batch_size for cost in shown if cost.batch_size is not None}
    title = "Cost" if len(sizes) != 1 else f"Cost (calls of batch size {sizes.pop()})"
    rows = [_cost_row(name, before, after) for name in LABELS] if shown else []
    if any(cost.nonzeros is not None for cost in shown):
        rows.insert(2, ("Sparsity", *(percent(c.sparsity if c else None) for c in (before, after)), ""))
    if any(cost.latency for cost in shown):
        rows.append(("Quartiles, ms", *(_quartiles(c.latency if c else None) for c in (before, after)), ""))
    if any(cost.latency and cost.latency.surely_above_ms is not None for cost in shown):
        rows.append(("Median, 95 % sure", *(_surely(c.latency if c else None) for c in (before, after)), ""))
    return Table(title, ("", *names, "change"), tuple(rows))


def _cost_row(name: str, before: Cost | None, after: Cost | None) -> tuple[str, ...]:
    old, new = (getattr(cost, name) if cost else None for cost in (before, after))
    if name == "latency":
        return (
            LABELS[name],
            *(_milliseconds(x.median_ms) if x else UNKNOWN for x in (old, new)),
            speedup(old, new),
        )
    if "bytes" in name:
        return LABELS[name], size(old), size(new), change(old, new)
    if (
        before
        and after
        and "macs" in name
        and None not in (old, new)
        and before.batch_size != after.batch_size
    ):
        return LABELS[name], *counts(old, new), "other batch size"
    return LABELS[name], *counts(old, new), change(old, new)


def _metrics(report: Report) -> Table:
    before, after = report.metrics_before, report.metrics_after
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        difference = UNKNOWN if old is None or new is None else f"{new - old:+.4g}"
        rows.append((name, number(old), number(new), difference))
    if not before:
        return Table("Metrics", ("", "after"), tuple((name, new) for name, _, new, _ in rows))
    return Table("Metrics", ("", "before", "after", "difference"), tuple(rows))


def _layers(layers: Sequence[Layer], limit: int) -> Table:
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


def kernels(acceleration: Acceleration | None, limit: int = MAX_LAYERS) -> Table:
    """Return what each linear layer takes with the dense and with the sparse kernel."""
    if acceleration is None:
        return Table("Sparse kernels", ("",), ())
    rows = [
        (
            layer.name,
            percent(layer.sparsity),
            UNKNOWN if layer.num_rows is None else f"{layer.num_rows:,}",
            *(_milliseconds(x.median_ms) if x else UNKNOWN for x in (layer.dense, layer.sparse)),
            _verdict(layer),
        )
        for layer in acceleration.layers
    ]
    columns = ("layer", "sparsity", "rows", "dense", acceleration.kernel, "")
    title = f"Sparse kernels ({acceleration.kernel}) on this machine"
    return Table(title, columns, elided(rows, limit))


def _verdict(layer: LayerKernel) -> str:
    if layer.sparse is None or layer.reason is not None:
        return layer.reason or UNKNOWN
    return speedup(layer.dense, layer.sparse)


def _frozen(report: Report, limit: int) -> Table:
    """What stayed whole, counted by the reason: a large model has thousands of dims."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.frozen.items():
        by_reason.setdefault(reason, []).append(name)
    rows = [(why, f"{len(names):,}", names[0]) for why, names in by_reason.items()]
    return Table("What stays whole", ("reason", "dims", "such as"), elided(rows, limit))


def _updates(report: Report, limit: int) -> Table:
    rows = [
        (f"{u.step:,}", percent(u.progress), percent(u.requested), percent(u.achieved))
        for u in report.updates
    ]
    rows = rows if len(rows) > 1 else []
    return Table("Updates of the masks", ("step", "progress", "requested", "achieved"), elided(rows, limit))


def _evaluations(report: Report, limit: int) -> Table:
    names = list(dict.fromkeys(name for evaluation in report.evaluations for name in evaluation.metrics))[
        :MAX_METRICS
    ]
    rows = [
        (f"{e.step:,}", percent(e.sparsity), *(number(e.metrics.get(name)) for name in names))
        for e in report.evaluations
    ]
    return Table("Validation along the run", ("step", "sparsity", *names), elided(rows, limit))


def _notes(report: Report) -> tuple[str, ...]:
    before, after = report.cost_before, report.cost_after
    notes = []
    if after and after.sparsity and (not before or before.params == after.params):
        notes.append(ZEROS)
    notes += [GZIP] if after and after.gzip_bytes is not None else []
    notes += [EFFECTIVE] if after and after.effective_macs is not None else []
    if unit(report) == "channels":
        notes.append(CHANNELS)
    if (found := report.acceleration) and not found.is_converted and any(x.is_faster for x in found.layers):
        notes.append(KERNELS)
    if latency := (after and after.latency) or (before and before.latency):
        notes.append(_conditions(latency))
    if empty := [layer.name for layer in report.layers if layer.params and not layer.nonzeros]:
        notes.append(f"Nothing is left of {', '.join(empty)}.")
    reasons = {LABELS.get(n, n): r for cost in (before, after) if cost for n, r in cost.unmeasured.items()}
    notes += [f"{label}: {reason}." for label, reason in reasons.items()]
    return tuple(notes)


def _conditions(latency: Latency) -> str:
    clock = "processor time" if latency.clock == "cpu" else "time on the clock"
    threads = "one thread" if latency.num_threads == 1 else f"{latency.num_threads} threads"
    return (
        f"Latency is the median {clock} of a call in eval mode on {latency.device}, {threads}. Where the quartiles "
        "of before and after overlap, there is no measurable difference."
    )


def speedup(old: Latency | None, new: Latency | None) -> str:
    """Return how much faster or slower, where that is more than noise; and between what, where it is known."""
    if old is None or new is None:
        return UNKNOWN
    if (old.device, old.num_threads, old.clock) != (new.device, new.num_threads, new.clock):
        return "not comparable"
    if not differs(old, new):
        return "no measurable difference"
    if not min(old.median_ms, new.median_ms) > 0.0:
        return UNKNOWN
    ratio = old.median_ms / new.median_ms
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def _surely(latency: Latency | None) -> str:
    if latency is None or latency.surely_above_ms is None or latency.surely_below_ms is None:
        return UNKNOWN
    return f"{latency.surely_above_ms:.3g} to {latency.surely_below_ms:.3g}"


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms"


def _quartiles(latency: Latency | None) -> str:
    return UNKNOWN if latency is None else f"{latency.low_ms:.3g} to {latency.high_ms:.3g}"
