"""What `export.py` does once its settings are checked: a trained model becomes a file, and a table says what it is."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lightning_prune.callbacks.own_steps import silenced, step_of
from lightning_prune.model.calls import Call, capture_call, undisturbed
from lightning_prune.model.export.programs import export_onnx, export_program
from lightning_prune.model.export.weights import export_weights
from lightning_prune.report.costs import Latency, differs
from lightning_prune.report.exports import Exported
from lightning_prune.report.text import size

if TYPE_CHECKING:
    import lightning as L

EXPORT_FILE = "export.json"


def ship(
    model: L.LightningModule,
    datamodule: L.LightningDataModule,
    folder: Path,
    *,
    format: str,
    filename: str,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
    latency: bool = True,
) -> Exported:
    """Write a trained model into a file, say what it is, and put the same into `export.json` beside it.

    Weights are those of the whole LightningModule, under the names that its checkpoint has. A program is the network
    alone: the module that a step of the LightningModule calls, with the inputs that it gets there.

    Args:
        model: trained; it is left as it was.
        datamodule: of whose test data the first batch is the example.
        folder: of the file.
        format: "safetensors", "compressed", "onnx" or "pt2".
        filename: of the file.
        dynamic_batch: as for `export_onnx`.
        tolerance: the same.
        latency: the same.

    Raises:
        ValueError: the model cannot be exported, or the file computes something else.
    """
    path = folder / filename
    if format in ("safetensors", "compressed"):
        found = export_weights(model, path, compressed=format == "compressed")
    else:
        call = _call_of_a_step(model, datamodule)
        export = export_onnx if format == "onnx" else export_program
        options: dict[str, Any] = {"dynamic_batch": dynamic_batch, "tolerance": tolerance, "latency": latency}
        found = export(call.module, _example_of(call), path, **options)
    text = json.dumps(dataclasses.asdict(found), indent=1)
    (folder / EXPORT_FILE).write_text(text + "\n", encoding="utf-8")
    Console().print(table_of(found))
    return found


def table_of(exported: Exported) -> Table:
    """Return what an exported model is, for the terminal."""
    table = Table(exported.format, "", show_header=True)
    table.add_row("file", exported.path)
    table.add_row(
        "size", f"{size(exported.num_bytes)}, {exported.density:.1%} of the weights as they are in memory"
    )
    if exported.error is not None:
        told = f"{exported.error:.1e}, relative; {exported.tolerance:g} is allowed"
        table.add_row("difference of outputs", told)
    if exported.before is not None and exported.after is not None:
        table.add_row("latency, torch", _told(exported.before))
        faster = exported.before.median_ms / exported.after.median_ms
        verdict = (
            f", {faster:.2f}x" if differs(exported.before, exported.after) else ", no measurable difference"
        )
        table.add_row("latency, file", _told(exported.after) + verdict)
    return table


def _told(latency: Latency) -> str:
    return f"{latency.median_ms:.3g} ms ({latency.low_ms:.3g} to {latency.high_ms:.3g})"


def _call_of_a_step(model: L.LightningModule, datamodule: L.LightningDataModule) -> Call:
    datamodule.prepare_data()
    datamodule.setup("test")
    batch = next(iter(datamodule.test_dataloader()))
    with undisturbed(model), silenced(model), capture_call(model) as caught:
        step_of(model)(model, batch)
    if caught.call is None:
        raise ValueError(
            f"`model` calls a module with parameters in its step, but {type(model).__name__} called none."
        )
    return caught.call


def _example_of(call: Call) -> Any:
    """Return the arguments of a call as one example."""
    if not call.kwargs:
        return call.args
    return dict(inspect.signature(call.module.forward).bind(*call.args, **call.kwargs).arguments)
