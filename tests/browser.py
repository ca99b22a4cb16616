"""A headless Chromium for tests that look at pages; where there is none they are skipped, except in CI."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DESKTOP, PHONE = (1280, 900), (390, 844)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)


def missing() -> str | None:
    """Say what is missing for these tests, or None."""
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if programs:
        return f"no {' and no '.join(programs)}: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "no selenium: pip install -r requirements-dev.txt"
    return None


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Start a browser, which has no network of its own accord."""
    if (reason := missing()) is not None:
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def emulate(driver: Any, size: tuple[int, int] = DESKTOP, *, dark: bool = False, media: str = "") -> None:
    """Take the form of a screen: its size, light or dark, or paper with `media="print"`."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def screenshot(driver: Any, path: Path | None = None) -> np.ndarray:
    """Return the whole page as pixels (height, width, 3), and leave the picture at `path`."""
    import base64

    from PIL import Image

    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    content = base64.b64decode(shot["data"])
    if path is not None:
        path.write_bytes(content)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def box(driver: Any, selector: str, index: int = 0) -> tuple[slice, slice]:
    """Return where an element lies in a screenshot of the whole page: rows and columns."""
    script = """const r = document.querySelectorAll(arguments[0])[arguments[1]].getBoundingClientRect();
                return [r.top + scrollY, r.bottom + scrollY, r.left + scrollX, r.right + scrollX];"""
    top, bottom, left, right = (round(v) for v in driver.execute_script(script, selector, index))
    return slice(top, bottom), slice(left, right)


def console(driver: Any) -> list[str]:
    """Return what the page has written to the console since the last call, errors of the browser too."""
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Return the addresses that were asked for since the last call."""
    import json

    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
