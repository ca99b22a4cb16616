"""The page as people see it: a real browser opens the file, offline, and the pixels of its screenshot are looked at."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from lightning_prune.report.render import to_page
from tests.browser import DESKTOP, PHONE, box, browser, console, emulate, requests, screenshot
from tests.report.test_page import EVIL, STRUCTURED, evil_report
from tests.report.test_render import REPORT

pytestmark = pytest.mark.slow
PAGES = {
    "masked": replace(REPORT, cost_before=replace(REPORT.cost_before, layers=STRUCTURED.cost_before.layers)),
    "structured": STRUCTURED,
    "evil": evil_report(),
}
SCREENS = {"desktop": (DESKTOP, False), "phone": (PHONE, False), "dark": (DESKTOP, True)}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("pages")
    for name, report in PAGES.items():
        (found / f"{name}.html").write_text(to_page(report), encoding="utf-8")
    return found


def opened(driver, folder, name, size=DESKTOP, **screen):
    emulate(driver, size, **screen)
    console(driver), requests(driver)
    driver.get((folder / f"{name}.html").as_uri())


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_all_is_there_and_nothing_complains(chromium, folder, name, screen):
    size, dark = SCREENS[screen]
    opened(chromium, folder, name, size, dark=dark)
    assert console(chromium) == []
    assert requests(chromium) == [(folder / f"{name}.html").as_uri()]
    drawn, canvases, sections = chromium.execute_script(
        """return [Number(document.documentElement.dataset.ready), document.querySelectorAll("canvas").length,
                   [...document.querySelectorAll("section h2")].map((h) => h.textContent)];"""
    )
    assert drawn == canvases > 2
    assert {"At a glance", "Along the run", "Cost", "Layers", "Recipe"} <= set(sections)
    width, shown = chromium.execute_script("return [document.documentElement.scrollWidth, innerWidth];")
    assert width <= shown == size[0]  # no scrolling sideways
    sticking_out = chromium.execute_script(
        """return [...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, .frame, pre, .copy")
             && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80));"""
    )
    assert sticking_out == []


@pytest.mark.parametrize("screen", SCREENS)
def test_every_plot_is_drawn(chromium, folder, screen, tmp_path):
    """The pixels of each plot: lines or bars in the colours of the page, enough of them, on the page's background."""
    size, dark = SCREENS[screen]
    opened(chromium, folder, "structured", size, dark=dark)
    pixels = screenshot(chromium, tmp_path / "page.png").astype(int)
    background = pixels[2, 2]
    assert background.mean() < 60 if dark else background.mean() > 230
    for index in range(chromium.execute_script("return document.querySelectorAll('canvas').length;")):
        plot = pixels[box(chromium, "canvas", index)]
        card = plot[0, 0]
        differs = np.abs(plot - card).max(axis=2) > 40
        colourful = plot.max(axis=2) - plot.min(axis=2) > 60  # text and grid lines are grey
        assert differs.mean() > 0.01, f"plot {index} is blank"
        assert colourful.sum() > 60, f"plot {index} has axes and no data"


def test_the_bars_are_as_long_as_their_numbers(chromium, folder):
    """Of the channels of one layer, 16 before and 8 after: the second bar is half as long as the first."""
    opened(chromium, folder, "structured")
    titles = chromium.execute_script(
        "return [...document.querySelectorAll('.chart figcaption')].map((f) => f.textContent);"
    )
    plot = screenshot(chromium).astype(int)[box(chromium, "canvas", titles.index("Channels of each layer"))]
    blue = (plot[..., 2] - plot[..., 0] > 90)[40:]  # below the legend
    orange = (plot[..., 0] - plot[..., 2] > 90)[40:]
    lengths = [int(colour.sum(axis=1).max()) for colour in (blue, orange)]
    assert lengths[1] / lengths[0] == pytest.approx(0.5, abs=0.03)


def test_names_that_look_like_scripts_do_not_run(chromium, folder):
    opened(chromium, folder, "evil")
    alerts = chromium.execute_script("return document.querySelectorAll('img').length;")
    assert alerts == 0 and EVIL in chromium.execute_script("return document.title;")


def test_a_plot_answers_to_the_menu_and_to_the_mouse(chromium, folder):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    opened(chromium, folder, "masked")
    script = """const figure = [...document.querySelectorAll(".chart")].find((f) => f.querySelector("select"));
                const chart = Chart.getChart(figure.querySelector("canvas"));
                return [chart.data.datasets[0].label, chart.tooltip.opacity];"""
    assert chromium.execute_script(script) == ["val/acc", 0]
    menu = chromium.find_element(By.CSS_SELECTOR, ".chart select")
    Select(menu).select_by_visible_text("val/f1")
    assert chromium.execute_script(script)[0] == "val/f1"
    Select(menu).select_by_visible_text("val/acc")
    canvas = menu.find_element(By.XPATH, "ancestor::figure").find_element(By.TAG_NAME, "canvas")
    ActionChains(chromium).move_to_element(canvas).perform()
    assert chromium.execute_script(script)[1] == 1
    assert console(chromium) == []


def test_commands_are_copied(chromium, folder):
    opened(chromium, folder, "structured")
    chromium.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    chromium.execute_script("document.querySelectorAll('button.copy')[1].click();")
    text = chromium.execute_async_script(
        "const done = arguments[0]; navigator.clipboard.readText().then(done, (e) => done(String(e)));"
    )
    assert text == STRUCTURED.load_command


def test_on_paper_it_is_black_on_white_and_nothing_is_cut(chromium, folder):
    opened(chromium, folder, "structured", dark=True, media="print")
    pixels = screenshot(chromium)
    assert pixels[2, 2].tolist() == [255, 255, 255]
    hidden = chromium.execute_script("return getComputedStyle(document.querySelector('nav')).display;")
    assert hidden == "none"
    printed = chromium.execute_cdp_cmd("Page.printToPDF", {})
    assert len(printed["data"]) > 10_000


def test_without_scripts_all_but_the_plots_is_there(chromium, folder):
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(chromium, folder, "structured")
        text = chromium.execute_cdp_cmd("DOMSnapshot.captureSnapshot", {"computedStyles": []})["strings"]
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    told = " ".join(text)
    assert "2.00x faster" in told and "The plot needs JavaScript" in told
    assert json.dumps(STRUCTURED.command)[1:-1] in told
