"""What a report says of costs and of kernels, as text in rows."""

from __future__ import annotations

from lightning_prune.report.costs import Acceleration, Cost, Latency, LayerKernel, differs
from lightning_prune.report.tables import MAX_LAYERS, Table
from lightning_prune.report.text import UNKNOWN, change, counts, elided, percent, size

LABELS = {
    "params": "Parameters",
    "nonzeros": "Nonzeros",
    "macs": "MACs",
    "effective_macs": "Effective MACs",
    "num_bytes": "File (state_dict)",
    "gzip_bytes": "File after gzip",
    "latency": "Latency",
}


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
