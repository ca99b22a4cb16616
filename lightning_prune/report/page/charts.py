"""The plots of a report: which numbers they show. None where there is nothing to plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from lightning_prune.report import cost_rows, rows
from lightning_prune.report.costs import Latency, LayerCost
from lightning_prune.report.data import Report
from lightning_prune.report.page.parts import Bars, Line, Lines

MAX_BARS = 300  # a canvas holds no more; the table has all
Charts: TypeAlias = tuple[Lines | Bars, ...]


def ramp(report: Report) -> Charts:
    """The sparsity that was asked for along the run, and what came of it."""
    if len(report.updates) < 2:
        return ()
    end = max([report.updates[-1].step, *(e.step for e in report.evaluations)])

    def held(values: list[tuple[float, float]]) -> tuple[tuple[float, float | None], ...]:
        last = values[-1]
        return (*values, (float(end), last[1])) if end > last[0] else tuple(values)

    requested = [(float(u.step), u.requested) for u in report.updates if u.requested is not None]
    found = [Line("requested", held(requested), is_stepped=True, is_dashed=True)] if requested else []
    achieved = held([(float(u.step), u.achieved) for u in report.updates])
    found.append(Line("achieved", achieved, is_stepped=True))
    return (
        Lines("Sparsity", "optimizer step", f"of the {rows.unit(report)}", tuple(found), is_percent=True),
    )


def metrics(report: Report, headline: Callable[[Mapping[str, object]], str | None]) -> Charts:
    """What was validated along the run, one metric at a time, the one that matters most first."""
    names = dict.fromkeys(name for evaluation in report.evaluations for name in evaluation.metrics)
    if len(report.evaluations) < 2 or not names:
        return ()
    first = headline(names)
    ordered = sorted(names, key=lambda name: name != first)
    found = tuple(
        Line(name, tuple((float(e.step), e.metrics[name]) for e in report.evaluations if name in e.metrics))
        for name in ordered
    )
    charts: list[Lines | Bars] = [Lines("Validation", "optimizer step", "", found, choose=True)]
    sparsities = {e.sparsity for e in report.evaluations}
    if len(sparsities) > 2:
        against = tuple(
            Line(
                name,
                tuple(sorted((e.sparsity, e.metrics[name]) for e in report.evaluations if name in e.metrics)),
            )
            for name in ordered
        )
        charts.append(
            Lines("Validation against sparsity", "sparsity", "", against, choose=True, markers=True)
        )
    return tuple(charts)


def what_is_left(report: Report) -> Charts:
    """Each cost as a fraction of the dense model's."""
    before, after = report.cost_before, report.cost_after
    if before is None or after is None:
        return ()
    labels, values = [], []
    for name, label in cost_rows.LABELS.items():
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, Latency) and isinstance(new, Latency):
            old, new = old.median_ms, new.median_ms
            label += (
                ""
                if cost_rows.speedup(before.latency, after.latency).endswith(("faster", "slower"))
                else " (no claim)"
            )
        if old and new is not None and not ("macs" in name and before.batch_size != after.batch_size):
            labels.append(label)
            values.append(new / old)
    return (
        (
            Bars(
                "What is left of the dense model",
                "",
                tuple(labels),
                (("left", tuple(values)),),
                is_percent=True,
            ),
        )
        if labels
        else ()
    )


def latency(report: Report) -> Charts:
    """Medians and the quartiles around them."""
    found = [
        (label, (cost.latency.low_ms, cost.latency.median_ms, cost.latency.high_ms))
        for label, cost in (("before", report.cost_before), ("after", report.cost_after))
        if cost is not None and cost.latency is not None
    ]
    if len(found) < 2:
        return ()
    labels, values = zip(*found, strict=True)
    return (
        Bars("Latency: median and quartiles", "milliseconds", labels, (("median", values),), intervals=True),
    )


def sparsities(report: Report) -> Charts:
    """The fraction of zeros of each pruned weight; of a smaller model, what is gone of its dense size."""
    dense = _dense(report)
    layers = [layer for layer in report.layers if layer.name in dense and dense[layer.name].params][:MAX_BARS]
    if not layers or rows.unit(report) in ("blocks", "branches"):  # those go as wholes
        return ()
    old = [dense[layer.name] for layer in layers]
    was = tuple(None if cost.nonzeros is None else 1 - cost.nonzeros / cost.params for cost in old)
    now = tuple(1 - layer.nonzeros / cost.params for cost, layer in zip(old, layers, strict=True))
    is_smaller = any(cost.shape != layer.shape for cost, layer in zip(old, layers, strict=True))
    title = "Weights removed or zero" if is_smaller else "Sparsity of each layer"
    names = tuple(layer.name for layer in layers)
    return (Bars(title + _more(report), "", names, (("before", was), ("after", now)), is_percent=True),)


def channels(report: Report) -> Charts:
    """How many channels, heads or other pieces each layer had and keeps."""
    dense, unit = _dense(report), rows.unit(report)
    found = [x for x in report.layers if None not in (x.num_groups, x.num_kept) and x.name in dense][
        :MAX_BARS
    ]
    if not found or unit in ("blocks", "branches"):
        return ()
    before = tuple(float(layer.num_groups or 0) for layer in found)
    after = tuple(float(layer.num_kept or 0) for layer in found)
    title = f"{unit.capitalize() if unit != 'pruned weights' else 'Pieces'} of each layer{_more(report)}"
    return (Bars(title, "", tuple(layer.name for layer in found), (("before", before), ("after", after))),)


def _more(report: Report) -> str:
    return f", the first {MAX_BARS} layers" if len(report.layers) > MAX_BARS else ""


def _dense(report: Report) -> dict[str, LayerCost]:
    return {layer.name: layer for layer in report.cost_before.layers} if report.cost_before else {}
