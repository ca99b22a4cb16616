"""The catalogue says what the docstrings say."""

import runpy

import pytest

import lightning_prune
from lightning_prune import config
from tests.conftest import ROOT

CATALOGUE = runpy.run_path(str(ROOT / "docs" / "catalogue.py"))
PRICED = [(axis, name) for axis in CATALOGUE["PRICED"] for name in config.nouns(axis)]


def test_the_page_is_up_to_date():
    assert CATALOGUE["PAGE"].read_text(encoding="utf-8") == CATALOGUE["page"](), (
        "run python docs/catalogue.py"
    )


@pytest.mark.parametrize(("axis", "name"), PRICED)
def test_each_method_says_what_it_costs_and_when_it_is_used(axis, name):
    doc = CATALOGUE["doc_of"](config.nouns(axis)[name])
    assert CATALOGUE["paragraph_of"](doc, "Cost") != "–" and CATALOGUE["paragraph_of"](doc, "When") != "–"


@pytest.mark.parametrize("name", CATALOGUE["CALLBACKS"])
def test_each_callback_does_so_too(name):
    doc = CATALOGUE["doc_of"](getattr(lightning_prune, name))
    assert CATALOGUE["paragraph_of"](doc, "Cost") != "–" and CATALOGUE["paragraph_of"](doc, "When") != "–"


def test_papers_are_read_off_the_text():
    text = (
        "Sun et al. 2023 (arXiv:2306.11695), section 3; Mocanu et al. 2018, SET (arXiv:1707.04780).\n\nArgs:"
    )
    first, second = CATALOGUE["papers_of"](text).split(", ")
    assert first == "[Sun et al. 2023](https://arxiv.org/abs/2306.11695)"
    assert second == "[Mocanu et al. 2018](https://arxiv.org/abs/1707.04780)"


def test_recipes_are_found_by_what_they_are_made_of():
    assert CATALOGUE["recipes_of"]("SparseGPT") == "`sparsegpt`"
    assert "`wanda`" in CATALOGUE["recipes_of"]("Wanda")
