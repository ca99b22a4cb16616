"""What a report says, as text in rows: terminal and markdown show the same page, and only differ in how."""

from __future__ import annotations

import sys

from lightning_prune.report.cost_rows import LABELS, costs, kernels
from lightning_prune.report.costs import Latency
from lightning_prune.report.data import Report
from lightning_prune.report.layer_rows import changed_layers
from lightning_prune.report.tables import MAX_LAYERS, MAX_UPDATES, Page, Table
from lightning_prune.report.text import UNKNOWN, elided, number, percent

MAX_METRICS = 4  # side by side; report.json holds them all
DID = {
    "train_time": "pruned while training",
    "post_training": "pruned after training",
    "initial": "pruned before training",
    "sparse_training": "trained sparse",
    "rewinding": "pruned between trainings",
    "none": "nothing was pruned",
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
        changed_layers(report.layers, many),
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
    achieved, facts = report.achieved_sparsity, []
    if achieved is not None or report.target_sparsity is not None:
        what = f" of the {unit(report)} ({asked(report)})" if asked(report) else ""
        facts.append(("Sparsity", f"{percent(achieved)}{what}"))
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


def asked(report: Report) -> str:
    """Return what was asked for: a sparsity, or a budget in its place; nothing where neither is known."""
    if report.budgets:
        return f"asked for: {', '.join(report.budgets)}"
    return "" if report.target_sparsity is None else f"asked for: {percent(report.target_sparsity)}"


def unit(report: Report) -> str:
    """Return what sparsity is the fraction of."""
    text = report.recipe.get("granularity", "")
    kind = "Branch" if "unit='branch'" in text else text.partition("(")[0]
    return {"Branch": "branches", "Channel": "channels", "Head": "heads", "Layer": "blocks"}.get(
        kind, "pruned weights"
    )


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


def _frozen(report: Report, limit: int) -> Table:
    """What stayed whole, counted by the reason: a large model has thousands of dims."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.frozen.items():
        by_reason.setdefault(reason, []).append(name)
    rows = [(why, f"{len(names):,}", names[0]) for why, names in by_reason.items()]
    return Table("What stays whole", ("reason", "dims", "such as"), elided(rows, limit))


def _updates(report: Report, limit: int) -> Table:
    is_asked = any(u.requested is not None for u in report.updates)
    columns = ("step", "progress", *(("requested",) if is_asked else ()), "achieved")
    rows = [
        (
            f"{u.step:,}",
            percent(u.progress),
            *((percent(u.requested),) if is_asked else ()),
            percent(u.achieved),
        )
        for u in report.updates
    ]
    return Table("Updates of the masks", columns, elided(rows if len(rows) > 1 else [], limit))


def _evaluations(report: Report, limit: int) -> Table:
    known = list(dict.fromkeys(name for evaluation in report.evaluations for name in evaluation.metrics))
    names = known[:MAX_METRICS]
    more = (
        f" ({MAX_METRICS} of {len(known)} metrics, report.json has all)" if len(known) > MAX_METRICS else ""
    )
    rows = [
        (f"{e.step:,}", percent(e.sparsity), *(number(e.metrics.get(name)) for name in names))
        for e in report.evaluations
    ]
    return Table(f"Validation along the run{more}", ("step", "sparsity", *names), elided(rows, limit))


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
    weights = [layer for layer in report.layers if len(layer.shape) > 1]  # biases begin as zeros
    if empty := [layer.name for layer in weights if layer.params and not layer.nonzeros]:
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
