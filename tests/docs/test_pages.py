"""The pages: their Python is executed, their links lead somewhere, every public name has its place."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

import lightning_prune
from lightning_prune import cli
from tests.conftest import ROOT
from tests.hydra_runs import composed

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import build  # noqa: E402
import reference  # noqa: E402

TESTED_ELSEWHERE = set[str]()
"""Guides whose commands and code have tests of their own."""
OPTIONAL = {"timm", "torchao", "torchvision", "transformers", "wandb"}
"""What guides may use, and the tests' environment need not have."""
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).as_posix() not in TESTED_ELSEWHERE
)
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    return PYTHON.findall(page.read_text(encoding="utf-8"))


def short(code: str) -> str:
    """A run of one epoch."""
    return code.replace("max_epochs=10,", "max_epochs=1, accelerator='cpu', enable_progress_bar=False,")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(DOCS).as_posix()
)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    sys.modules["page"] = type(sys)("page")  # where dataclasses of the page look for their names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for code in blocks(page):
            try:
                exec(compile(short(code), str(page), "exec"), namespace)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                pytest.skip(f"{error.name} is not installed")
    assert set(namespace) > {"__name__"}


COMMANDS = [
    pytest.param(line, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, line in enumerate(
        re.findall(r"^python train\.py .*", page.read_text(encoding="utf-8"), re.MULTILINE)
    )
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_of_a_command_are_known_and_fit_together(command):
    settings = [word for word in command.split()[2:] if word != "-m" and not word.startswith("hydra")]
    firsts = [re.sub(r"=([^,(\[{]+),.*", r"=\1", setting) for setting in settings]
    cli.check(composed(*firsts))


def test_every_public_name_is_in_the_reference_once():
    listed = [name for names in reference.names_by_family().values() for name in names]
    assert sorted(listed) == lightning_prune.__all__


def test_an_axis_that_nobody_has_written_about_has_a_page_all_the_same(monkeypatch):
    monkeypatch.delitem(reference.FAMILIES, "scope")
    page = reference.pages()["scope.md"]
    assert page.startswith("# Scope\n") and ".. autoclass:: lightning_prune.Global" in page


def test_a_public_name_without_a_docstring_stops_the_build(monkeypatch):
    monkeypatch.setattr(lightning_prune.Window, "__doc__", None)
    with pytest.raises(ValueError, match="Window is public, but has no docstring"):
        reference.pages()


def test_a_broken_link_stops_the_build():
    source = DOCS / "guides" / "budgets.md"
    with pytest.raises(build.BrokenLinkError, match=r"budgets\.md links to nowhere\.md"):
        build.translate("see [this](nowhere.md)", source, build.sources())


def test_all_links_of_all_pages_lead_somewhere():
    places = build.sources()
    assert len(places) > 20
    for source in places:
        if source.suffix == ".md":
            assert build.translate(source.read_text(encoding="utf-8"), source, places)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[m](../methods.md#x)", "[m](../methods.md#x)"),
        ("[b](../../benchmarks/README.md)", "[b](../measured.md)"),
        ("[the recipes](../../conf/pruning)", "the recipes (`conf/pruning`)"),
        ("a `Window` and `Window()`", "a {py:obj}`~lightning_prune.Window` and `Window()`"),
        ("## `Window`", "## `Window`"),
        ("[`Window`](../methods.md)", "[`Window`](../methods.md)"),
        ("```python\n[a](b.md)\n`Window`\n```", "```python\n[a](b.md)\n`Window`\n```"),
        (":::{tip}\n`Window`\n:::", ":::{tip}\n{py:obj}`~lightning_prune.Window`\n:::"),
    ],
)
def test_links_and_names_are_turned_to_the_site(text, wanted):
    assert build.translate(text, DOCS / "guides" / "budgets.md", build.sources()) == wanted


def test_the_pages_show_every_picture_that_is_drawn_and_no_other():
    pictures = runpy.run_path(str(DOCS / "pictures.py"))
    drawn = {pictures["file_of"](name) for name in pictures["PICTURES"]}
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert shown == drawn == set((DOCS / "pictures").iterdir())
    assert all(path.stat().st_size < 150_000 for path in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups", "schedules", "step", "window"])
def test_pictures_can_be_drawn(name, tmp_path):
    drawn = runpy.run_path(str(DOCS / "pictures.py"))["draw"](name, tmp_path)
    assert drawn.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("text", "is_fetching"),
    [
        ('<script src="_static/a.js"></script><a href="https://arxiv.org/abs/1">paper</a>', False),
        ('<script defer src="https://cdn.example/a.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ("a { background: url(https://example/b.png) }", True),
    ],
)
def test_a_page_that_would_fetch_something_stops_the_build(tmp_path, text, is_fetching):
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    assert build.fetching(tmp_path) == (["page.html"] if is_fetching else [])
