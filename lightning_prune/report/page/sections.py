"""What the page of a report shows, section by section: plain data from plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_prune.report import cost_rows, layer_rows, rows, tables
from lightning_prune.report.costs import Cost, Latency, differs
from lightning_prune.report.data import Group, Report
from lightning_prune.report.page import charts
from lightning_prune.report.page.parts import (
    Code,
    Document,
    Facts,
    Fold,
    Items,
    Part,
    Section,
    Tile,
    Tiles,
)
from lightning_prune.report.tables import Table
from lightning_prune.report.text import change, counts, number, percent, size

MAX_ROWS = 24  # of a table that is shown at once; longer ones are folded
MAX_PLACES = 12  # of a coupled group
COMMANDS = {
    "load_command": "Load the result, in Python",
    "resume_command": "Go on with the run",
    "command": "The command of this run",
}


def document(report: Report) -> Document:
    """Return the page of a report; sections that have nothing to say are empty."""
    page = rows.page(report)
    known = [report.model or "", report.environment.get("written", "")]
    return Document(
        title=page.title + (f": {report.model}" if report.model else ""),
        subtitle=", ".join(text for text in known[1:] if text),
        sections=(
            Section("At a glance", _glance(report)),
            Section("Warnings", (Items(report.warnings, are_warnings=True),) if report.warnings else ()),
            Section("Along the run", _along(report)),
            Section("Cost", _cost(report)),
            Section("Metrics", _tables(page, "Metrics")),
            Section("Layers", _layers(report)),
            Section("Sparse kernels", _tables(rows.page(report, limit=False), "Sparse kernels")),
            Section("Coupled groups", _groups(report)),
            Section("Load and resume", _commands(report)),
            Section("Recipe", _recipe(page)),
            Section("Configuration", _config(report)),
            Section("Environment", (Facts(tuple(report.environment.items())),) if report.environment else ()),
            Section("How to read this", (Items(page.notes),) if page.notes else ()),
        ),
    )


def headline(metrics: Mapping[str, object]) -> str | None:
    """Return the metric that matters most, by its name: an accuracy, any other score, or a loss.

    Example:
        >>> headline({"val/loss": 0.1, "val/acc": 0.9}), headline({})
        ('val/acc', None)
    """
    wanted = ("acc", "f1", "auroc", "map", "iou", "perplexity", "loss")
    found = [name for word in wanted for name in metrics if word in name.lower()]
    return next(iter([*found, *metrics]), None)


def _glance(report: Report) -> tuple[Part, ...]:
    before, after = report.cost_before, report.cost_after
    tiles = []
    if report.achieved_sparsity is not None:
        unit = rows.unit(report)
        tiles.append(Tile(f"Sparsity of the {unit}", percent(report.achieved_sparsity), rows.asked(report)))
    name = headline(report.metrics_after)
    if name is not None:
        old = report.metrics_before.get(name)
        tiles.append(
            Tile(
                name, number(report.metrics_after[name]), f"before: {number(old)}" if old is not None else ""
            )
        )
    if after is not None:
        tiles += [
            _count_tile(label, name, before, after)
            for label, name in _COUNTED
            if getattr(after, name) is not None
        ]
        if after.latency is not None:
            tiles.append(_latency_tile(before.latency if before else None, after.latency))
    if report.equivalence_error is not None:
        tiles.append(
            Tile(
                "Differs from the masked model",
                f"{report.equivalence_error:.1e}",
                "at most, relative, in float64",
            )
        )
    return (Tiles(tuple(tiles)),) if tiles else ()


_COUNTED = (
    ("Parameters", "params"),
    ("Nonzeros", "nonzeros"),
    ("MACs of a call", "macs"),
    ("File (state_dict)", "num_bytes"),
)


def _count_tile(label: str, name: str, before: Cost | None, after: Cost) -> Tile:
    old, new = (getattr(before, name) if before else None), getattr(after, name)
    (shown,) = (size(new),) if "bytes" in name else counts(new)
    if old is None:
        return Tile(label, shown)
    same = old == new
    told = (
        "as before" if same else f"{change(old, new)} of {size(old) if 'bytes' in name else counts(old)[0]}"
    )
    return Tile(label, shown, told, "" if same or new > old else "good")


def _latency_tile(old: Latency | None, new: Latency) -> Tile:
    label, told = "Latency of a call", f"median {new.median_ms:.3g} ms"
    if old is None:
        return Tile(label, f"{new.median_ms:.3g} ms")
    claim = cost_rows.speedup(old, new)
    is_faster = differs(old, new) and new.median_ms < old.median_ms
    return Tile(label, claim, f"{told}, before {old.median_ms:.3g} ms", "good" if is_faster else "same")


def _along(report: Report) -> tuple[Part, ...]:
    found: list[Part] = [*charts.ramp(report), *charts.metrics(report, headline)]
    tables = rows.page(report, limit=False).tables
    for title, label in (("Updates of the masks", "updates"), ("Validation along the run", "validations")):
        found += [Fold(f"All {len(t.rows):,} {label}", (t,)) for t in tables if t.title.startswith(title)]
    return tuple(found)


def _cost(report: Report) -> tuple[Part, ...]:
    page = rows.page(report)
    return (*_tables(page, "Cost"), *charts.what_is_left(report), *charts.latency(report))


def _layers(report: Report) -> tuple[Part, ...]:
    table = layer_rows.all_layers(report)
    shown: tuple[Part, ...] = (table,) if table.rows else ()
    if len(table.rows) > MAX_ROWS:
        shown = (Fold(f"All {len(table.rows):,} layers in numbers", shown),)
    return (*charts.sparsities(report), *charts.channels(report), *shown)


def _groups(report: Report) -> tuple[Part, ...]:
    found: list[Part] = []
    if report.groups:
        gone, role = sum(group.kept < group.size for group in report.groups), report.groups[0].role
        of = f"{gone:,} of {len(report.groups):,}"
        told = (
            f"{of} residual {role}s that can go as wholes: gone."
            if role in ("block", "branch")
            else f"{of} groups of slices that can only go together: smaller than they were."
        )
        table = _blocks(report.groups) if role in ("block", "branch") else _coupled(report.groups)
        is_long = len(table.rows) > MAX_ROWS
        found += [Items((told,)), Fold(f"All {len(table.rows):,} groups", (table,)) if is_long else table]
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.frozen.items():
        by_reason.setdefault(reason, []).append(name)
    if by_reason:
        summary = tuple(
            (reason, f"{len(names):,}", ", ".join(names[:2])) for reason, names in by_reason.items()
        )
        found.append(Table("What stays whole, and why", ("reason", "dims", "such as"), summary))
        everything = tuple((name, reason) for name, reason in report.frozen.items())
        found.append(
            Fold("Each of them by name", (Table("", ("group or dim of a tensor", "reason"), everything),))
        )
    return tuple(found)


def _blocks(groups: Sequence[Group]) -> Table:
    return Table("", ("block", ""), tuple((group.name, "kept" if group.kept else "gone") for group in groups))


def _coupled(groups: Sequence[Group]) -> Table:
    head = ("group", "kind", "before", "kept", "goes together")
    return Table("", head, tuple((g.name, g.role, f"{g.size:,}", f"{g.kept:,}", _places(g)) for g in groups))


def _places(group: Group) -> str:
    more = len(group.places) - MAX_PLACES
    return ", ".join(group.places[:MAX_PLACES]) + (f" and {more} more" if more > 0 else "")


def _commands(report: Report) -> tuple[Part, ...]:
    told = [Code(label, text) for name, label in COMMANDS.items() if (text := getattr(report, name))]
    if report.checkpoint:
        told.insert(0, Code("The checkpoint", report.checkpoint))
    return tuple(told)


def _recipe(page: tables.Page) -> tuple[Part, ...]:
    found = tuple((label, text) for label, text in page.facts if label not in rows.PATHS)
    return (Facts(found),) if found else ()


def _config(report: Report) -> tuple[Part, ...]:
    if not report.config:
        return ()
    return (Fold("As composed; secrets are left out", (Code("yaml", report.config),)),)


def _tables(page: tables.Page, title: str) -> tuple[Part, ...]:
    """Return the tables of a section; one that is headed as the section is needs no head of its own."""
    found = [table for table in page.tables if table.title.startswith(title)]
    return tuple(replace(table, title="") if table.title == title else table for table in found)
