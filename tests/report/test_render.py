import io
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from rich.console import Console

from lightning_prune.report import rows
from lightning_prune.report.costs import Acceleration, Cost, Latency, LayerKernel
from lightning_prune.report.data import Evaluation, Layer, Report, Update
from lightning_prune.report.render import to_markdown, to_rich, write
from lightning_prune.report.storage import load
from tests.report.test_storage import REPORTS

DENSE = Cost(
    266_610, 266_610, 17_036_800, 17_036_800, 1_068_210, 989_000, Latency(0.502, 0.498, 0.521, 40), 64
)
MASKED = Cost(
    266_610, 27_050, 17_036_800, 1_703_680, 1_068_210, 152_000, Latency(0.504, 0.499, 0.515, 40), 64
)
REPORT = Report(
    "train_time",
    {"sparsity": "0.9", "criterion": "Magnitude(p=1)", "include": "None", "exclude": "()"},
    target_sparsity=0.9,
    achieved_sparsity=0.9,
    layers=(Layer("net.0.weight", (300, 784), 235_200, 21_168), Layer("net.2.weight", (10, 300), 3_000, 900)),
    updates=tuple(Update(10 * i, i / 70, 0.9 * i / 70, 0.9 * i / 70) for i in range(71)),
    evaluations=(
        Evaluation(100, 0.3, {"val/acc": 0.9612}),
        Evaluation(200, 0.5, {"val/acc": 0.9701, "val/f1": 0.5}),
    ),
    cost_before=DENSE,
    cost_after=MASKED,
    metrics_before={"val/acc": 0.9843},
    metrics_after={"val/acc": 0.9845, "val/loss": 0.0632},
    warnings=("The learning rate has [decayed] | too *early*.",),
    environment={"torch": "2.13.0"},
    resume_command="python train.py ckpt_path=last.ckpt",
)


def shown(report, width=80):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(to_rich(report))
    return console.file.getvalue()


def table(report, title):
    (found,) = [t for t in rows.page(report).tables if t.title.startswith(title)]
    return {row[0]: row[1:] for row in found.rows}


def test_costs_before_and_after():
    assert table(REPORT, "Cost (calls of batch size 64)") == {
        "Parameters": ("266,610", "266,610", "same"),
        "Nonzeros": ("266,610", "27,050", "-89.9 %"),
        "Sparsity": ("0.00 %", "89.85 %", ""),
        "MACs": ("17.04 M", "17.04 M", "same"),
        "Effective MACs": ("17.04 M", "1.70 M", "-90.0 %"),
        "File (state_dict)": ("1.07 MB", "1.07 MB", "same"),
        "File after gzip": ("989.00 kB", "152.00 kB", "-84.6 %"),
        "Latency": ("0.502 ms", "0.504 ms", "no measurable difference"),
        "Quartiles, ms": ("0.498 to 0.521", "0.499 to 0.515", ""),
    }


@pytest.mark.parametrize(
    ("after", "claim"),
    [
        (Latency(0.25, 0.24, 0.26, 40), "2.01x faster"),
        (Latency(1.004, 1.0, 1.1, 40), "2.00x slower"),
        (Latency(0.4, 0.3, 0.498, 40), "no measurable difference"),
        (Latency(0.25, 0.24, 0.26, 40, device="cuda:0", clock="wall"), "not comparable"),
        (None, "-"),
    ],
)
def test_a_speed_is_claimed_only_where_it_is_measured(after, claim):
    report = replace(REPORT, cost_after=replace(MASKED, latency=after))
    assert table(report, "Cost")["Latency"][2] == claim


def test_costs_of_different_batches_are_not_compared():
    found = table(replace(REPORT, cost_after=replace(MASKED, batch_size=32)), "Cost")
    assert found["MACs"][2] == found["Effective MACs"][2] == "other batch size"
    assert found["Parameters"][2] == "same"


def test_what_was_not_measured_is_no_zero_and_has_its_reason():
    after = Cost(266_610, 27_050, unmeasured={"macs": "RuntimeError: no", "latency": "not asked for"})
    report = replace(REPORT, cost_after=after)
    assert table(report, "Cost")["MACs"] == ("17.04 M", "-", "-")
    assert {"MACs: RuntimeError: no.", "Latency: not asked for."} <= set(rows.page(report).notes)


def test_metrics_before_and_after():
    assert table(REPORT, "Metrics") == {
        "val/acc": ("0.9843", "0.9845", "+0.0002"),
        "val/loss": ("-", "0.0632", "-"),
    }
    assert table(replace(REPORT, metrics_before={}), "Metrics") == {
        "val/acc": ("0.9845",),
        "val/loss": ("0.0632",),
    }


def test_the_middle_of_many_layers_is_left_out():
    layers = tuple(Layer(f"net.{i}.weight", (2, 2), 4, 2) for i in range(100))
    names = list(table(replace(REPORT, layers=layers), "Layers"))
    assert names == [
        *(f"net.{i}.weight" for i in range(20)),
        "... 60 more ...",
        *(f"net.{i}.weight" for i in range(80, 100)),
    ]
    assert len(table(replace(REPORT, layers=layers[:40]), "Layers")) == 40


def test_columns_of_layers_appear_where_they_say_something():
    def columns(**changes):
        layers = tuple(replace(layer, **changes) for layer in REPORT.layers)
        (found,) = [t for t in rows.page(replace(REPORT, layers=layers)).tables if t.title == "Layers"]
        return found.columns[4:]

    assert columns() == ()
    assert columns(num_groups=300, num_kept=30) == ("groups kept",)
    assert columns(macs_before=5, macs_after=5) == ("MACs",)
    assert columns(macs_before=5, macs_after=3) == ("MACs before", "MACs")


def test_updates_show_what_was_asked_for_and_what_came_of_it():
    found = table(REPORT, "Updates")
    assert found["700"] == ("100.00 %", "90.00 %", "90.00 %")
    assert list(found)[5] == "... 61 more ..."


def test_a_metric_that_is_logged_now_and_then_keeps_its_column():
    assert table(REPORT, "Validation") == {
        "100": ("30.00 %", "0.9612", "-"),
        "200": ("50.00 %", "0.9701", "0.5000"),
    }


def test_only_so_many_metrics_stand_side_by_side():
    report = replace(REPORT, evaluations=(Evaluation(1, 0.5, {f"m{i}": 0.5 for i in range(9)}),))
    assert table(report, "Validation") == {"1": ("50.00 %", *["0.5000"] * rows.MAX_METRICS)}
    assert table(report, "Validation along the run (4 of 9 metrics, report.json has all)")


def test_it_is_said_that_zeros_bring_no_speed_unless_the_model_became_smaller():
    assert rows.ZEROS in rows.page(REPORT).notes
    smaller = replace(REPORT, cost_after=replace(MASKED, params=100_000))
    assert rows.ZEROS not in rows.page(smaller).notes
    assert rows.ZEROS not in rows.page(replace(REPORT, cost_after=DENSE)).notes


def test_a_layer_without_any_weight_left_is_named():
    """A bias of zeros may have begun as such."""
    report = replace(REPORT, layers=(Layer("net.0.weight", (2, 2), 4, 0), Layer("net.0.bias", (2,), 2, 0)))
    assert "Nothing is left of net.0.weight." in rows.page(report).notes


def test_terminal_and_markdown_say_the_same():
    words = re.compile(r"[\w.,%/+-]+")
    terminal, markdown = shown(REPORT, width=200), to_markdown(replace(REPORT, environment={}))
    headings = {"Warnings", "Notes"}
    said = set(words.findall(terminal)), set(words.findall(markdown.replace("\\", "")))
    assert {w for w in said[0] ^ said[1] if not set(w) <= set("-:")} <= headings


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    layers = (
        Layer(
            "model.encoder.layers.11.attention.self.query.weight", (768, 768), 589_824, 58_982, 768, 77, 9, 5
        ),
    )
    metrics = {f"val/a_metric_with_a_long_name_{i}": 0.5 for i in range(8)}
    evaluations = (Evaluation(100, 0.3, metrics), Evaluation(200, 0.3, metrics))
    report = replace(REPORT, layers=layers, evaluations=evaluations, metrics_after=metrics)
    text = shown(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "0.5000" in text and "90.00 %" in text  # names fold before numbers do


def test_at_80_columns_nothing_of_the_costs_is_cut_or_wrapped():
    lines = shown(REPORT, 80).splitlines()
    for label, cells in table(REPORT, "Cost").items():
        assert any(line.split() == " ".join([label, *cells]).split() for line in lines), label


def test_names_are_not_taken_for_markup():
    layers = (Layer("[bold]net[/bold].a|b*c*.__d__", (2, 2), 4, 2),)
    report = replace(REPORT, layers=layers)
    assert "[bold]net[/bold].a|b*c*.__d__" in shown(report)
    (line,) = [line for line in to_markdown(report).splitlines() if "a\\|b" in line]
    assert line.startswith(r"| \[bold\]net\[/bold\].a\|b\*c\*.\_\_d\_\_ | 2 x 2 | 2 |")


def test_tables_of_markdown_are_whole():
    for block in re.findall(r"(?:^\|.*\n)+", to_markdown(REPORT), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@settings(max_examples=40)
@given(REPORTS)
def test_any_report_can_be_shown(report):
    assert shown(report).strip()
    assert to_markdown(report).startswith("# lightning_prune: ")


def test_an_empty_report_is_short():
    assert to_markdown(Report("none")) == "# lightning_prune: nothing was pruned\n"


def test_all_files_are_written(tmp_path):
    paths = write(REPORT, tmp_path / "run")
    assert [p.name for p in paths] == ["report.json", "report.md", "report.html"]
    assert load(paths[0]) == REPORT
    assert paths[1].read_text(encoding="utf-8") == to_markdown(REPORT)


SLOW, FAST = Latency(1.0, 0.9, 1.1, 40), Latency(0.25, 0.24, 0.26, 40)
KERNELS = Acceleration(
    "csr",
    (
        LayerKernel("net.0", (300, 784), 0.91, 64, SLOW, FAST, is_faster=True),
        LayerKernel("net.2", (10, 300), 0.7, 64, SLOW, replace(SLOW, low_ms=0.95)),
        LayerKernel("net.4", (10, 10), 0.0, reason="too small"),
    ),
)


def test_sparse_kernels_are_told_with_what_they_bring():
    report = replace(REPORT, acceleration=KERNELS)
    assert table(report, "Sparse kernels (csr)") == {
        "net.0": ("91.00 %", "64", "1 ms", "0.25 ms", "4.00x faster"),
        "net.2": ("70.00 %", "64", "1 ms", "1 ms", "no measurable difference"),
        "net.4": ("0.00 %", "-", "-", "-", "too small"),
    }
    assert "`accelerate(model, example)`" in "".join(rows.page(report).notes)
    used = replace(report, acceleration=replace(KERNELS, is_converted=True))
    assert "`accelerate(model, example)`" not in "".join(rows.page(used).notes)
    assert "Sparse kernels" not in shown(REPORT) and "4.00x faster" in shown(report, width=200)


def test_a_speedup_is_that_of_the_medians():
    assert [layer.speedup for layer in KERNELS.layers] == [4.0, 1.0, None]
    assert KERNELS.num_converted == 0 and replace(KERNELS, is_converted=True).num_converted == 1
