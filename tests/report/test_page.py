"""The page of a report: what it says, that nothing in it is taken for markup, and that it needs nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings

from lightning_prune.report.costs import Cost, Latency, LayerCost
from lightning_prune.report.data import Group, Layer, Report, Update
from lightning_prune.report.page import html, parts
from lightning_prune.report.page.sections import document, headline
from lightning_prune.report.render import to_page
from lightning_prune.report.tables import Table
from tests.report.test_render import REPORT
from tests.report.test_storage import REPORTS

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
STRUCTURED = Report(
    "train_time",
    {"granularity": "Channel(multiple_of=8)"},
    0.5,
    0.5,
    layers=(Layer("a.weight", (8, 3), 24, 24, 16, 8, 480, 240), Layer("a.bias", (8,), 8, 8)),
    updates=(Update(0, 0.0, 0.0, 0.0), Update(9, 1.0, 0.5, 0.5)),
    cost_before=Cost(
        64, 64, 480, 480, 900, 800, Latency(2.0, 1.9, 2.1, 40), 10, (LayerCost("a.weight", (16, 3), 48, 46),)
    ),
    cost_after=Cost(
        32, 32, 240, 240, 500, 400, Latency(1.0, 0.9, 1.1, 40), 10, (LayerCost("a.weight", (8, 3), 24, 24),)
    ),
    equivalence_error=2.5e-16,
    frozen={"head.weight[0]": "output of the model", "head.bias[0]": "output of the model"},
    groups=(Group("a.weight", "channel", 16, 8, ("a.weight[0]", "a.bias[0]", "b.weight[1]")),),
    model="LitNet",
    command="python train.py pruning=global_structured",
    config="seed: 0\n",
    checkpoint="last.ckpt",
    load_command="model = load_pruned(LitNet, 'last.ckpt')",
)


class Elements(HTMLParser):
    """All elements with their attributes, the texts, and what scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self._inside and self._inside[-1] == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif "style" not in self._inside:
            self.text += data


def charts_of(page: str) -> dict[str, dict]:
    data = [json.loads(text) for a, text in Elements(page).scripts if a.get("type") == "application/json"]
    return {chart["title"]: chart for chart in data}


def sections_of(report: Report) -> dict[str, tuple]:
    return {section.title: section.parts for section in document(report).sections if section.parts}


def test_the_page_of_a_structured_run_has_all_that_is_known():
    page = to_page(STRUCTURED)
    told = Elements(page).text
    for text in (
        *("LitNet", "50.00 %", "asked for: 50.00 %", "2.00x faster", "2.5e-16", "output of the model"),
        *("a.weight[0], a.bias[0], b.weight[1]", "16 x 3", "8 x 3", "seed: 0", STRUCTURED.command),
        *(STRUCTURED.load_command, "last.ckpt"),
    ):
        assert text in told, text
    charts = charts_of(page)
    assert charts["Channels of each layer"]["labels"] == ["a.weight"]
    assert charts["Channels of each layer"]["series"] == [["before", [16.0]], ["after", [8.0]]]
    removed = charts["Weights removed or zero"]["series"]
    assert removed == [["before", [pytest.approx(2 / 48)]], ["after", [0.5]]]
    left = charts["What is left of the dense model"]
    assert dict(zip(left["labels"], left["series"][0][1], strict=True))["Parameters"] == 0.5
    assert charts["Latency: median and quartiles"]["series"][0][1] == [[1.9, 2.0, 2.1], [0.9, 1.0, 1.1]]
    assert [line["name"] for line in charts["Sparsity"]["lines"]] == ["requested", "achieved"]


def test_no_speed_is_claimed_where_there_is_none():
    page = to_page(REPORT)
    assert "no measurable difference" in Elements(page).text
    assert "Latency (no claim)" in charts_of(page)["What is left of the dense model"]["labels"]


def test_the_ramp_is_held_until_the_run_ends():
    points = charts_of(to_page(REPORT))["Sparsity"]["lines"][1]["points"]
    assert len(points) == 71 and points[-1] == [700.0, 0.9]
    later = replace(REPORT, evaluations=(replace(REPORT.evaluations[0], step=900),))
    assert charts_of(to_page(later))["Sparsity"]["lines"][1]["points"][-1] == [900.0, 0.9]


def test_the_metric_that_matters_comes_first():
    assert headline({"val/loss": 1, "val/acc": 1}) == "val/acc"
    assert headline({"val/loss": 1, "val/perplexity": 1}) == "val/perplexity"
    assert headline({"speed": 1}) == "speed"
    assert [line["name"] for line in charts_of(to_page(REPORT))["Validation"]["lines"]] == [
        "val/acc",
        "val/f1",
    ]


def test_every_layer_and_every_reason_is_there_however_many():
    layers = tuple(Layer(f"net.{i}.weight", (2, 2), 4, 2) for i in range(500))
    frozen = {f"net.{i}.bias[0]": "input" for i in range(500)}
    told = Elements(to_page(replace(REPORT, layers=layers, frozen=frozen))).text
    assert all(f"net.{i}.weight" in told and f"net.{i}.bias[0]" in told for i in range(500))


def test_blocks_are_kept_or_gone():
    groups = (Group("blocks.0", "block", 1, 1), Group("blocks.1", "block", 1, 0))
    report = replace(STRUCTURED, recipe={"granularity": "Layer(unit='block')"}, groups=groups)
    page = to_page(report)
    assert "1 of 2 residual blocks that can go as wholes: gone." in Elements(page).text
    (table,) = [
        part
        for part in sections_of(report)["Coupled groups"]
        if getattr(part, "columns", ("",))[0] == "block"
    ]
    assert table.rows == (("blocks.0", "kept"), ("blocks.1", "gone"))
    assert not {"Weights removed or zero", "Blocks of each layer"} & set(charts_of(page))


def evil_report() -> Report:
    texts = {EVIL: EVIL}
    layer = Layer(EVIL, (2, 2), 4, 2, 2, 1, 4, 2)
    cost = Cost(
        4, 2, 4, 2, 9, 9, Latency(1.0, 0.9, 1.1, 9, device=EVIL), 2, (LayerCost(EVIL, (4, 2), 8, 8),), texts
    )
    return replace(
        *(REPORT,),
        recipe=texts,
        layers=(layer,),
        evaluations=tuple(replace(e, metrics={EVIL: 0.5}) for e in REPORT.evaluations),
        cost_before=cost,
        cost_after=cost,
        metrics_before={EVIL: 0.5},
        metrics_after={EVIL: 0.5},
        warnings=(EVIL,),
        environment=texts,
        checkpoint=EVIL,
        resume_command=EVIL,
        load_command=EVIL,
        frozen=texts,
        groups=(Group(EVIL, EVIL, 2, 1, (EVIL,)),),
        model=EVIL,
        command=EVIL,
        config=f"a: {EVIL}",
    )


def test_nothing_that_a_run_says_is_taken_for_markup():
    """Names of modules, warnings and settings are shown as they are, in the page and in the data of its plots."""
    page = to_page(evil_report())
    found = Elements(page)
    assert not [tag for tag, _ in found.found if tag == "img"]
    assert not [a for _, a in found.found if any(name.startswith("on") for name in a)]
    executable = [text for a, text in found.scripts if a.get("type") != "application/json"]
    assert executable == [html.asset(html.LIBRARY), html.asset(html.SCRIPT)]
    assert found.text.count(EVIL) > 15
    assert charts_of(page)["Weights removed or zero"]["labels"] == [EVIL]


def test_only_the_pages_own_scripts_may_run():
    page = to_page(STRUCTURED)
    found = Elements(page)
    policy = next(a["content"] for tag, a in found.found if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    allowed = {b64decode(digest) for digest in re.findall(r"'sha256-([^']+)'", policy)}
    own = [text for a, text in found.scripts if a.get("type") != "application/json"]
    assert allowed == {hashlib.sha256(text.encode()).digest() for text in own}


def test_no_other_file_and_no_network_is_asked_for():
    for tag, attributes in Elements(to_page(STRUCTURED)).found:
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)


def test_the_library_is_the_one_whose_licence_lies_beside_it():
    head = html.asset(html.LIBRARY)[:200]
    assert "Chart.js v4" in head and "MIT License" in head
    assert "The MIT License (MIT)" in html.asset("chart.LICENSE.md")
    assert "</script" not in html.asset(html.LIBRARY).lower() + html.asset(html.SCRIPT).lower()


def test_a_page_stays_small():
    assert len(to_page(STRUCTURED)) < 300_000
    assert len(to_page(Report("none"))) < 30_000  # without plots there is no library in it


def test_numbers_that_json_does_not_know_are_left_out_of_plots():
    series = (("now", (float("nan"), float("inf"), 0.5)),)
    page = html.to_html(
        parts.Document("t", (parts.Section("s", (parts.Bars("b", "", ("x", "y", "z"), series),)),))
    )
    assert charts_of(page)["b"]["series"] == [["now", [None, None, 0.5]]]


def test_other_pages_can_be_made_of_the_same_parts():
    table = Table("Jobs", ("job", "acc"), (("0", "0.9"), ("1", "0.8")))
    fold = parts.Fold("more", (parts.Code("yaml", "a: 1"), parts.Facts((("a", "b"),)), parts.Items(("x",))))
    page = html.to_html(
        parts.Document("A sweep", (parts.Section("All jobs", (table, fold)), parts.Section("None", ())))
    )
    told = Elements(page)
    assert [a.get("id") for tag, a in told.found if tag == "section"] == ["all-jobs"]
    assert "A sweep" in told.text and "a: 1" in told.text and "Jobs" in told.text


@settings(max_examples=40)
@given(REPORTS)
def test_any_report_has_a_page(report):
    page = to_page(report)
    found = Elements(page)
    assert len([a for a, _ in found.scripts if a.get("type") != "application/json"]) in (1, 2)
    assert page.rstrip().endswith("</html>") and sections_of(report) is not None
