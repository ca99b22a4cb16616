"""The page of a sweep: what it says, and, in a real browser, what is drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lightning_prune import sweep
from lightning_prune.sweep.page import document, to_html
from tests.browser import DESKTOP, PHONE, box, browser, console, emulate, requests, screenshot
from tests.sweep.test_summary import write_job

EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    accuracies = {0.0: (0.95, 0.96), 0.5: (0.95, 0.96), 0.9: (0.94, 0.955), 0.98: (0.6, 0.8)}
    jobs = [(s, seed, acc) for s, found in accuracies.items() for seed, acc in enumerate(found)]
    for number, (sparsity, seed, acc) in enumerate(jobs):
        metrics = {"val/acc": acc, "sparsity": sparsity, "nonzeros": 15000 * (1 - sparsity), "params": 15000}
        metrics |= {"dense/nonzeros": 15000, "macs": 1000 * (1 - sparsity / 2)}
        write_job(folder, number, [f"pruning.sparsity={sparsity}", f"seed={seed}"], metrics)
    write_job(folder, 8, ["pruning.sparsity=0.99", f"+note={EVIL}"], error=EVIL)
    (folder / "4" / "report.json").write_text(json.dumps({"load_command": "load_pruned(Net, 'x.ckpt')"}))
    (folder / "sweep.json").write_text(json.dumps({"command": ["python", "train.py", "-m"], "jobs": {}}))
    return sweep.summarise(folder)


def test_the_page_says_what_to_take_and_what_is_missing(summary):
    sections = {section.title: section.parts for section in document(summary).sections}
    tiles, facts, code = sections["Recommended"]
    assert [(tile.label, tile.value, tile.detail) for tile in tiles.tiles[:2]] == [
        ("val/acc", "0.9475 ± 0.0106", "to be reached: 0.945"),
        ("nonzeros", "1,500", "10% of the dense model's"),
    ]
    assert ("pruning.sparsity", "0.9") in facts.facts
    assert code.text == "load_pruned(Net, 'x.ckpt')"
    items, rest = sections["Still missing"]
    assert EVIL in items.texts[0] and "resume=true" in rest.text
    titles = [plot.title for plot in sections["Quality and size"]]
    assert titles == ["val/acc and nonzeros", "val/acc and macs"]  # the parameters are all the same
    (table,) = sections["Settings"]
    assert len(table.rows) == 4 and sum("★" in row[0] for row in table.rows) == 1


def test_names_are_shown_and_never_taken_for_html(summary):
    text = to_html(summary)
    assert "&lt;/script&gt;&lt;img" in text
    assert EVIL not in text and "<img" not in text


@pytest.mark.slow
def test_the_page_in_a_browser(summary, tmp_path):
    path = tmp_path / "sweep.html"
    path.write_text(to_html(summary), encoding="utf-8")
    with browser(tmp_path / "profile") as driver:
        for name, size in (("desktop", DESKTOP), ("phone", PHONE)):
            emulate(driver, size)
            console(driver), requests(driver)
            driver.get(path.as_uri())
            assert console(driver) == []
            assert requests(driver) == [path.as_uri()]
            width, shown = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth];")
            assert width <= shown == size[0]
            pixels = screenshot(driver, tmp_path / f"{name}.png").astype(int)
            for index in range(2):
                plot = pixels[box(driver, "canvas", index)]
                blue = plot[..., 2] - plot[..., 0] > 90
                orange = plot[..., 0] - plot[..., 2] > 90
                assert blue.sum() > 200, "no front"
                assert orange.sum() > 60, "no recommended point"
                assert np.abs(plot - plot[0, 0]).max(axis=2).max() > 60
        told = driver.execute_script(
            """const chart = Chart.getChart(document.querySelector("canvas"));
               const star = chart.data.datasets.find((d) => d.label === "recommended").data[0];
               return [star.x, star.y, star.text[0]];"""
        )
        assert told == [pytest.approx(1500), pytest.approx(0.9475), "pruning.sparsity=0.9"]
        first = """const body = document.querySelector("table.sortable").tBodies[0];
                   return [...body.rows].map((row) => row.cells[0].textContent.replace("★ ", ""));"""
        driver.execute_script("document.querySelector('table.sortable thead th').click();")
        assert driver.execute_script(first) == ["0.98", "0.9", "0.5", "0.0"]
        driver.execute_script("document.querySelector('table.sortable thead th').click();")
        assert driver.execute_script(first) == ["0.0", "0.5", "0.9", "0.98"]
        assert console(driver) == []
