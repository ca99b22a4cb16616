"""Writes `docs/methods.md`, the catalogue of all methods, from docstrings and recipes: `python docs/catalogue.py`."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning_prune
from lightning_prune import config

PAGE = ROOT / "docs" / "methods.md"
RECIPES = ROOT / "conf" / "pruning"
AXES = {
    "criterion": "How good is each weight?",
    "solver": "How do the weights that stay make up for those that go?",
    "masking": "What becomes of pruned weights while masks may still change?",
    "regularizer": "What drives groups towards zero before they go?",
    "scope": "Who competes with whom?",
    "granularity": "What goes as one piece?",
    "schedule": "Along which curve?",
    "window": "When are masks updated?",
    "budget": "What may a smaller model cost?",
}
CALLBACKS = (
    "TrainTimePruning",
    "PostTrainingPruning",
    "InitialPruning",
    "SparseTraining",
    "WeightRewinding",
    "Distillation",
    "CollapseGuard",
    "SparseModelCheckpoint",
    "SparseEarlyStopping",
    "SparsityMonitor",
)
ASIDE = {
    "`sensitivity`, `python sensitivity.py`": ("lightning_prune.model.sensitivity", "sensitivity"),
    "`allocate`, `python sensitivity.py sparsity=`": ("lightning_prune.core.scopes.curves", "allocate"),
    "`reestimate_batch_norm=True`": ("lightning_prune.model.calibration", "reestimate_batch_norm_"),
}
"""What goes with pruning and is no callback: how it is asked for -> its module and its name there."""
HEAD = ["what", "papers", "cost", "when"]
CITED = re.compile(r"((?:de )?[A-Z][\w'-]+ (?:& [A-Z][\w'-]+|et al\.) (?:19|20)\d\d)")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def doc_of(member: object) -> str:
    """Return a docstring without its indentation."""
    return inspect.cleandoc(member.__doc__ or "")


def header_of(recipe: Path) -> str:
    """Return the comment that a file begins with, in the form of a docstring."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = "\n".join(line.removeprefix("# ") for line in lines[:end] if not line.startswith("# @package"))
    return re.sub(r"^(Cost|When): ", r"\n\1: ", text, flags=re.MULTILINE)


def as_cell(text: str) -> str:
    """Return a paragraph as one cell of a table, without arXiv numbers: papers have a cell of their own."""
    line = re.sub(rf" \({ARXIV.pattern}\)|, {ARXIV.pattern}", "", " ".join(text.split()))
    return line.replace("|", "\\|")


def summary_of(doc: str) -> str:
    """Return the first paragraph, as one cell of a table."""
    return as_cell(doc.split("\n\n")[0])


def papers_of(doc: str) -> str:
    """Return all papers that a text cites: authors and year, linked where it has the arXiv number."""
    _, *pieces = CITED.split(" ".join(doc.split()))
    cited = [
        (name, number)
        for name, rest in zip(pieces[::2], pieces[1::2], strict=True)
        for number in ARXIV.findall(rest) or [""]
    ]
    linked = {name for name, number in cited if number}
    papers = [
        f"[{name}](https://arxiv.org/abs/{number})" if number else name
        for name, number in cited
        if number or name not in linked
    ]
    return ", ".join(dict.fromkeys(papers)) or "–"


def paragraph_of(doc: str, name: str) -> str:
    """Return the paragraph "Cost:" or "When:"."""
    found = re.search(rf"^{name}: (.*?)(?:\n\n|\Z)", doc, flags=re.DOTALL | re.MULTILINE)
    return as_cell(found[1]) if found else "–"


def cells_of(doc: str) -> list[str]:
    """Return what it is, its papers, what it costs and when it is used."""
    return [summary_of(doc), papers_of(doc), paragraph_of(doc, "Cost"), paragraph_of(doc, "When")]


def recipes_of(axis: str, member: str) -> str:
    """Return the recipes whose file names the member's own file, or builds it."""
    own = "|".join(path.stem for path in (RECIPES / axis).glob("*.yaml") if _builds(path, member))
    choice = re.compile(rf"\b{axis}@pruning\.\w+: ({own})$", re.MULTILINE)
    named = [
        p.stem for p in sorted(RECIPES.glob("*.yaml")) if own and choice.search(p.read_text(encoding="utf-8"))
    ]
    return ", ".join(f"`{name}`" for name in named) or "–"


def _builds(path: Path, member: str) -> bool:
    return f"/{member}@_here_" in path.read_text(encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def sections() -> dict[str, str]:
    """Return the tables of the page by their headings."""
    callbacks = [[f"`{name}`", *cells_of(doc_of(getattr(lightning_prune, name)))] for name in CALLBACKS]
    recipes = [[f"`{path.stem}`", *cells_of(header_of(path))] for path in sorted(RECIPES.glob("*.yaml"))]
    aside = [
        [how, *cells_of(doc_of(getattr(import_module(module), name)))]
        for how, (module, name) in ASIDE.items()
    ]
    found = {
        "Callbacks": table(["", *HEAD], callbacks),
        "Recipes": table(["`pruning=`", *HEAD], recipes),
    }
    for axis, question in AXES.items():
        members = sorted(config.nouns(axis).items())
        rows = [[f"`{name}`", *cells_of(doc_of(member)), recipes_of(axis, name)] for name, member in members]
        found[f"{question} `{axis}`"] = table(["", *HEAD, "recipes"], rows)
    found["Beside pruning"] = table(["", *HEAD], aside)
    return found


def page() -> str:
    """Return the whole page."""
    opening = (
        "# All methods\n\nThis page is written by `python docs/catalogue.py` from the docstrings, which say more, and "
        "from the first lines of the recipes."
    )
    parts = [f"## {heading}\n\n{body}" for heading, body in sections().items()]
    return "\n\n".join([opening, *parts]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
