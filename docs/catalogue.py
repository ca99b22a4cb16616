"""Writes `docs/methods.md`, the catalogue of all members, from their docstrings: `python docs/catalogue.py`."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning_prune
from lightning_prune import config

PAGE = ROOT / "docs" / "methods.md"
AXES = {
    "criterion": "How good is each weight?",
    "solver": "How do the weights that stay make up for those that go?",
    "masking": "What becomes of pruned weights while masks may still change?",
    "regularizer": "What drives groups towards zero before they go?",
    "scope": "Who competes with whom?",
    "granularity": "What goes as one piece?",
    "schedule": "Along which curve?",
}
CALLBACKS = (
    "TrainTimePruning",
    "PostTrainingPruning",
    "InitialPruning",
    "SparseTraining",
    "WeightRewinding",
    "Distillation",
    "CollapseGuard",
)
PRICED = ("criterion", "masking", "regularizer", "solver")
"""Axes whose members say what they cost and when they are used."""
PAPER = re.compile(r"((?:[A-Z][\w.'-]+ (?:& [A-Z][\w.'-]+ )?(?:et al\. )?)\d{4})[^().;\d]*\((arXiv:[\d.]+)\)")


def doc_of(member: type) -> str:
    """Return a docstring without its indentation."""
    return inspect.cleandoc(member.__doc__ or "")


def summary_of(doc: str) -> str:
    """Return the first paragraph, as one line of a table."""
    return " ".join(doc.split("\n\n")[0].split()).replace("|", "\\|")


def papers_of(doc: str) -> str:
    """Return the papers of the part above the arguments: authors, year and arXiv number."""
    text = " ".join(re.split(r"\n(?:Args|Raises|Example|Returns):", doc)[0].split())
    found = PAPER.findall(text)
    links = [f"[{name}](https://arxiv.org/abs/{place.removeprefix('arXiv:')})" for name, place in found]
    return ", ".join(dict.fromkeys(links)) or "–"


def paragraph_of(doc: str, name: str) -> str:
    """Return the paragraph "Cost:" or "When:"."""
    found = re.search(rf"^{name}: (.*?)(?:\n\n|\Z)", doc, flags=re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()).replace("|", "\\|") if found else "–"


def priced_of(doc: str) -> list[str]:
    """Return what it costs, and when it is used."""
    return [paragraph_of(doc, "Cost"), paragraph_of(doc, "When")]


def recipes_of(member: str) -> str:
    """Return the recipes whose file names the member's own file, or builds it."""
    folder = ROOT / "conf" / "pruning"
    own = "|".join(path.stem for path in folder.glob("*/*.yaml") if _builds(path, member))
    choice = re.compile(rf"@pruning\.\w+: ({own})$", re.MULTILINE)
    named = [
        p.stem for p in sorted(folder.glob("*.yaml")) if own and choice.search(p.read_text(encoding="utf-8"))
    ]
    return ", ".join(f"`{name}`" for name in named) or "–"


def _builds(path: Path, member: str) -> bool:
    return f"/{member}@_here_" in path.read_text(encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def page() -> str:
    """Return the whole page."""
    parts = [
        "# All methods\n\nThis page is written by `python docs/catalogue.py` from the docstrings, which say more."
    ]
    rows = []
    for name in CALLBACKS:
        doc = doc_of(getattr(lightning_prune, name))
        rows.append([f"`{name}`", summary_of(doc), papers_of(doc), *priced_of(doc)])
    parts.append(f"## Callbacks\n\n{table(['', 'what', 'papers', 'cost', 'when'], rows)}")
    for axis, question in AXES.items():
        priced = axis in PRICED
        rows = []
        for name, member in sorted(config.nouns(axis).items()):
            doc = doc_of(member)
            more = priced_of(doc) if priced else []
            rows.append([f"`{name}`", summary_of(doc), papers_of(doc), *more, recipes_of(name)])
        head = ["", "what", "papers", *(["cost", "when"] if priced else []), "recipes"]
        parts.append(f"## {question} `{axis}`\n\n{table(head, rows)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
