"""Builds the site, strictly: `python docs/build.py [folder]`, by default into `build/site`. It needs no network.

What is written in Markdown and in notebooks is read where it lies in the repository, so links work there as well; they
are checked and turned to where a page is on the site, and public names in `code` become links to the reference.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(DOCS)]

import lightning_prune
import reference

ELSEWHERE = {
    "benchmarks/README.md": "measured.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages that lie outside of `docs`: path in the repository -> path on the site."""
PUBLIC = re.compile(r"(?<![`\w])`(" + "|".join(lightning_prune.__all__) + r")`(?!`)")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(\s*)(`{3,}|:{3,})(.*)$")
DIRECTIVE = re.compile(r"\{(?!eval-rst|code|literalinclude|image|figure|toctree)[\w:-]+\}")
"""Fences within which text is text."""


FETCHED = re.compile(
    r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//|url\(["']?(?:https?:)?//|@import"""
)
"""What would make a browser fetch something from elsewhere when a page is read."""


class BrokenLinkError(ValueError):
    """A link to what is not there."""


def sources() -> dict[Path, Path]:
    """Return what the site is made of: file in the repository -> its path on the site."""
    found = {path: path.relative_to(DOCS) for path in sorted(DOCS.rglob("*.md"))}
    found |= {path: path.relative_to(ROOT) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    found |= {ROOT / name: Path(place) for name, place in ELSEWHERE.items() if (ROOT / name).is_file()}
    return found


def translate(text: str, source: Path, places: dict[Path, Path]) -> str:
    """Return Markdown as the site needs it.

    Args:
        text: of the page.
        source: the file it is from.
        places: of all pages on the site.

    Raises:
        BrokenLinkError: a link leads to a file that is not there.
    """

    def as_link(match: re.Match[str]) -> str:
        return _as_link(match, source, places)

    def as_text(line: str) -> str:
        linked = LINK.sub(as_link, line)
        return linked if line.startswith("#") else _outside_links(linked)

    return "\n".join(as_text(line) if is_text else line for line, is_text in _lines(text))


def _as_link(match: re.Match[str], source: Path, places: dict[Path, Path]) -> str:
    mark, label, target = match.groups()
    path, hash_mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return match[0]
    file = Path(os.path.normpath(source.parent / unquote(path)))
    if not file.exists():
        raise BrokenLinkError(f"{source.relative_to(ROOT)} links to {target}, which is not there.")
    if mark:
        return match[0]
    if file in places:
        there = os.path.relpath(places[file], places[source].parent)
        return f"[{label}]({Path(there).as_posix()}{hash_mark}{anchor})"
    return f"{label} (`{file.relative_to(ROOT).as_posix()}`)" if label.strip("`") != path else f"`{path}`"


def _outside_links(line: str) -> str:
    """Link public names, except within what is a link already."""
    pieces = re.split(r"(\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\))", line)
    as_role = r"{py:obj}`~lightning_prune.\1`"
    return "".join(p if at % 2 else PUBLIC.sub(as_role, p) for at, p in enumerate(pieces))


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each line, and whether it is text rather than code."""
    open_fences: list[tuple[str, bool]] = []
    for line in text.split("\n"):
        fence = FENCE.match(line)
        if fence and open_fences and not fence[3].strip() and fence[2].startswith(open_fences[-1][0]):
            open_fences.pop()
            yield line, False
        elif fence and all(is_text for _, is_text in open_fences):
            open_fences.append((fence[2], bool(DIRECTIVE.match(fence[3].strip()))))
            yield line, False
        else:
            yield line, all(is_text for _, is_text in open_fences)


def stage(folder: Path) -> None:
    """Gather pages, notebooks, pictures and the reference in one folder, as Sphinx wants them.

    Raises:
        BrokenLinkError: a link leads to a file that is not there.
        ValueError: a public name has no docstring.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS / "_static", folder / "_static")
    shutil.copytree(DOCS / "pictures", folder / "pictures")
    shutil.copy(DOCS / "conf.py", folder)
    places = sources()
    for source, place in places.items():
        text = source.read_text(encoding="utf-8")
        change: Callable[[str], str] = lambda part, source=source: translate(part, source, places)  # noqa: E731
        _write(folder / place, _notebook(text, change) if source.suffix == ".ipynb" else change(text))
    for name, text in reference.pages().items():
        _write(folder / "reference" / name, text)


def _notebook(text: str, change: Callable[[str], str]) -> str:
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = change("".join(cell["source"]))
    return json.dumps(notebook)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def fetching(folder: Path) -> list[str]:
    """Return the pages and styles of a site that fetch something from elsewhere when they are read."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".html", ".css")]
    return [
        path.relative_to(folder).as_posix()
        for path in files
        if FETCHED.search(path.read_text(encoding="utf-8"))
    ]


def build(folder: Path) -> int:
    """Build the site into a folder, and return an exit status: every warning is an error, and so is what is fetched."""
    staged = folder.parent / f"{folder.name}-sources"
    stage(staged)
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    status = subprocess.run([*command, str(staged), str(folder)], env=environment, check=False).returncode
    if status == 0 and (found := fetching(folder)):
        print(f"these fetch something from elsewhere: {', '.join(found)}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "build" / "site"
    status = build(target)
    print(f"site: {target / 'index.html'}" if status == 0 else "the site was not built")
    sys.exit(status)
