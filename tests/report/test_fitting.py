"""Tables of a terminal, at several widths."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from lightning_prune.report.costs import Cost
from lightning_prune.report.data import Layer, Report
from lightning_prune.report.preview import PlannedLayer, Preview
from lightning_prune.report.preview_rows import page
from lightning_prune.report.render import page_to_rich, to_rich

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


def test_a_plan_fits_too():
    name, shape, after = "network.features.0.weight", (32, 32, 3, 3), (16, 16, 3, 3)
    layer = PlannedLayer(name, True, shape, after, 9216, 2304, 2304, 4_718_592, 1_179_648, 36_864, 9216)
    cost = Cost(9216)
    found = page(Preview("train_time", layers=(layer,), cost_before=cost, cost_after=cost))
    for width, left_out in ((110, None), (80, "shape")):
        console = Console(file=StringIO(), width=width)
        console.print(page_to_rich(found))
        shown = console.file.getvalue()
        assert name in shown and "16 x 16 x 3 x 3" in shown
        assert ("too wide for this terminal: shape" in shown) == bool(left_out)
