"""Tables of a terminal, at several widths."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from lightning_prune.report.data import Layer, Report
from lightning_prune.report.render import to_rich

LAYERS = tuple(
    Layer(f"network.features.{i}.weight", (32, 16, 3, 3), 4608, 2000, 32, 16, 37_750_000, 9_437_184)
    for i in range(3)
)
SPARED = {
    120: (),
    95: ("MACs before",),
    80: ("MACs before", "shape"),
    60: ("MACs before", "shape", "nonzero"),
}


@pytest.mark.parametrize("width", SPARED)
def test_columns_are_left_out_rather_than_names_broken(width):
    console = Console(file=StringIO(), width=width)
    console.print(to_rich(Report("train_time", layers=LAYERS)))
    shown = console.file.getvalue()
    assert all(layer.name in shown for layer in LAYERS if width > 60)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    left_out = SPARED[width]
    assert (f"too wide for this terminal: {', '.join(left_out)}" in shown) == bool(left_out)
    assert ("32 x 16 x 3 x 3" in shown) == ("shape" not in left_out)
