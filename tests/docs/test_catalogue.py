"""The catalogue has a row for each method, and says what docstrings and recipes say."""

import re
import runpy
from importlib import import_module
from inspect import isclass

import lightning as L
import pytest

import lightning_prune
from lightning_prune import config
from tests.conftest import ROOT

CATALOGUE = runpy.run_path(str(ROOT / "docs" / "catalogue.py"))
TEXT = CATALOGUE["PAGE"].read_text(encoding="utf-8")
RECIPES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "conf" / "pruning").glob("*.yaml")}
PUBLIC = {name: getattr(lightning_prune, name) for name in lightning_prune.__all__}
ASIDE = {
    "`sensitivity`, `python sensitivity.py`": "lightning_prune.model.sensitivity.sensitivity",
    "`allocate`, `python sensitivity.py sparsity=`": "lightning_prune.core.scopes.curves.allocate",
    "`reestimate_batch_norm=True`": "lightning_prune.model.calibration.reestimate_batch_norm_",
}


def methods():
    """What has to have a row: the end of its section's heading, its first cell, and the text that it is made of."""
    for axis in config.AXES:
        yield from ((f"`{axis}`", f"`{name}`", noun.__doc__) for name, noun in config.nouns(axis).items())
    yield from (("Recipes", f"`{name}`", text) for name, text in sorted(RECIPES.items()))
    for name, member in PUBLIC.items():
        if isclass(member) and issubclass(member, L.Callback):
            yield "Callbacks", f"`{name}`", member.__doc__
    for label, path in ASIDE.items():
        module, _, name = path.rpartition(".")
        yield "Beside pruning", label, getattr(import_module(module), name).__doc__


METHODS = [pytest.param(*method, id=method[1].strip("`")) for method in methods()]


def row_of(section, label):
    """The cells behind the first of the one row that begins with the label."""
    bodies = [part for part in TEXT.split("\n## ")[1:] if part.splitlines()[0].endswith(section)]
    rows = [line.strip("| ").split(" | ") for body in bodies for line in body.splitlines()[2:]]
    (found,) = (cells for first, *cells in rows if first == label)
    return found


def test_the_page_is_up_to_date():
    assert CATALOGUE["page"]() == TEXT, "run python docs/catalogue.py"


@pytest.mark.parametrize(("section", "label", "text"), METHODS)
def test_each_method_has_a_row_with_its_cost_and_when_it_is_used(section, label, text):
    what, _, cost, when = row_of(section, label)[:4]
    assert all(cell.strip("–. ") for cell in (what, cost, when))


@pytest.mark.parametrize(("section", "label", "text"), METHODS)
def test_each_paper_of_a_text_is_in_its_row(section, label, text):
    papers, words = row_of(section, label)[1], re.sub(r"\s(# )?\s*", " ", text)
    numbers = re.findall(r"arXiv:([\d.]*\d)", words)
    named = re.findall(r"\w+ (?:et al\.|& \w+) \d{4}", words)
    assert [number for number in numbers if f"/abs/{number})" not in papers] == []
    assert [name for name in named if name not in papers] == []


@pytest.mark.parametrize(
    ("text", "papers"),
    [
        (
            "Sun et al. 2023 (arXiv:2306.11695), section 3.",
            "[Sun et al. 2023](https://arxiv.org/abs/2306.11695)",
        ),
        (
            "SET, Mocanu et al. 2018\n(a, arXiv:1707.04780).",
            "[Mocanu et al. 2018](https://arxiv.org/abs/1707.04780)",
        ),
        (
            "FORCE, de Jorge et al.\n2020 (arXiv:2006.09081)",
            "[de Jorge et al. 2020](https://arxiv.org/abs/2006.09081)",
        ),
        ("(Zhu & Gupta 2017, arXiv:1710.01878)", "[Zhu & Gupta 2017](https://arxiv.org/abs/1710.01878)"),
        ("Hassibi & Stork 1993 (surgeon), eq. 5", "Hassibi & Stork 1993"),
        (
            "LeCun et al. 1990 with what Theis et al. 2018 (arXiv:1801.05787) take; Theis et al. 2018 say more.",
            "LeCun et al. 1990, [Theis et al. 2018](https://arxiv.org/abs/1801.05787)",
        ),
        ("Nobody has written of it (2020).", "–"),
    ],
)
def test_papers_are_read_off_the_text(text, papers):
    assert CATALOGUE["papers_of"](text) == papers


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("|w| (Lin et al. 2020, arXiv:2006.07253): all", r"\|w\| (Lin et al. 2020): all"),
        ("N:M. Mishra et al. 2021 (arXiv:2104.08378).", "N:M. Mishra et al. 2021."),
    ],
)
def test_numbers_of_papers_are_in_one_cell_only(text, cell):
    assert CATALOGUE["as_cell"](text) == cell


def test_recipes_are_found_by_what_they_are_made_of():
    assert CATALOGUE["recipes_of"]("solver", "SparseGPT") == "`sparsegpt`"
    assert "`wanda`" in CATALOGUE["recipes_of"]("criterion", "Wanda")
