"""From a document to one HTML file that needs nothing else: style, script, data and the plotting library are inside."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from html import escape
from importlib import resources
from itertools import groupby
from typing import Any

from lightning_prune.report.page import parts
from lightning_prune.report.page.parts import Document, Part, Section
from lightning_prune.report.tables import Table

LONG = 32  # characters: a column with a longer text holds no numbers, and may wrap
STYLE, SCRIPT, LIBRARY = "page.css", "page.js", "chart.umd.min.js"


def to_html(document: Document) -> str:
    """Return a page as HTML text.

    Whatever texts say is shown and never taken for markup, and the page allows no script but its own two (their hashes
    are in its content security policy), no connection and no other file. Without scripts it is complete but for plots.

    Example:
        >>> "&lt;b&gt;" in to_html(Document("<b>", ()))
        True
    """
    sections = [section for section in document.sections if section.parts]
    body = "\n".join([_header(document, sections), "<main>", *map(_section, sections), "</main>"])
    scripts = [asset(LIBRARY), asset(SCRIPT)] if "<canvas" in body else [asset(SCRIPT)]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(document.title)}</title>
<style>
{asset(STYLE)}</style>
</head>
<body>
{body}
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


@cache
def asset(name: str) -> str:
    """Return a file of this package as text."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _header(document: Document, sections: list[Section]) -> str:
    links = "".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in sections)
    subtitle = f"<p>{escape(document.subtitle)}</p>" if document.subtitle else ""
    navigation = f'<nav aria-label="Sections">{links}</nav>' if len(sections) > 2 else ""
    return f"<header><h1>{escape(document.title)}</h1>{subtitle}{navigation}</header>"


def _section(section: Section) -> str:
    anchor = _anchor(section)
    content = _parts(section.parts)
    heading = f'<h2 id="{anchor}-title">{escape(section.title)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n{heading}\n{content}\n</section>'


def _anchor(section: Section) -> str:
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in section.title.lower()).split())


def _parts(found: Sequence[Part]) -> str:
    """Write parts one below the other, charts that follow each other side by side where there is room."""
    blocks = []
    for are_charts, group in groupby(
        found, lambda part: isinstance(part, (parts.Lines, parts.Bars, parts.Scatter))
    ):
        content = "\n".join(_WRITERS[type(part)](part) for part in group)
        blocks.append(f'<div class="charts">\n{content}\n</div>' if are_charts else content)
    return "\n".join(blocks)


def _tiles(part: parts.Tiles) -> str:
    tiles = "".join(
        f'<div class="tile {tile.tone}"><dt>{escape(tile.label)}</dt><dd><b>{escape(tile.value)}</b>'
        f"{f'<span>{escape(tile.detail)}</span>' if tile.detail else ''}</dd></div>"
        for tile in part.tiles
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _facts(part: parts.Facts) -> str:
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in part.facts)
    return f'<dl class="facts">{rows}</dl>'


def _items(part: parts.Items) -> str:
    if part.are_warnings:
        return "".join(f'<p class="warning" role="note">{escape(text)}</p>' for text in part.texts)
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in part.texts)}</ul>"


def _code(part: parts.Code) -> str:
    button = '<button type="button" class="copy">Copy</button>'
    label = f"<figcaption>{escape(part.label)}</figcaption>"
    return f'<figure class="code">{label}{button}<pre tabindex="0"><code>{escape(part.text)}</code></pre></figure>'


def _fold(part: parts.Fold) -> str:
    content = _parts(part.parts)
    return f"<details><summary>{escape(part.summary)}</summary>\n{content}\n</details>"


def _table(table: Table) -> str:
    are_long = [any(len(row[i]) > LONG for row in table.rows) for i in range(len(table.columns))]
    names = zip(table.columns, are_long, strict=True)
    head = "".join(f'<th scope="col"{_class(is_long)}>{escape(column)}</th>' for column, is_long in names)
    rows = "".join(_row(row, are_long) for row in table.rows)
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    kind = ' class="sortable"' if table.is_sortable else ""
    # a table that is wider than a phone scrolls by itself: the page does not
    label = escape(table.title or "table")
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table{kind}>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: tuple[str, ...], are_long: Sequence[bool]) -> str:
    cells = "".join(
        f"<td{_class(True)}><div>{escape(text)}</div></td>" if is_long else f"<td>{escape(text)}</td>"
        for text, is_long in zip(row[1:], are_long[1:], strict=True)
    )
    name = escape(row[0]).replace(".", ".<wbr>")  # where a name of a layer may be broken
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _class(is_long: bool) -> str:
    return ' class="long"' if is_long else ""


def _chart(part: parts.Lines | parts.Bars | parts.Scatter) -> str:
    kind = type(part).__name__.lower()
    data = _embedded({"kind": kind, **asdict(part)})
    height = f' style="height: {_height(part)}px"' if isinstance(part, parts.Bars) else ""
    return (
        f'<figure class="chart"><figcaption>{escape(part.title)}</figcaption><div class="menu"></div>'
        f'<div class="frame"><div class="canvas {kind}"{height}>'
        f'<canvas role="img" aria-label="{escape(part.title)}"></canvas></div></div>'
        f'<script type="application/json">{data}</script>'
        "<noscript><p>The plot needs JavaScript; its numbers are in the tables.</p></noscript></figure>"
    )


def _height(part: parts.Bars) -> int:
    return 90 + len(part.labels) * (14 + 12 * len(part.series))


def _embedded(data: Any) -> str:
    """Write JSON that can stand inside of a script element: no `<`, and no number that JSON does not know."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


_WRITERS: dict[type, Callable[[Any], str]] = {
    parts.Tiles: _tiles,
    parts.Facts: _facts,
    parts.Items: _items,
    parts.Code: _code,
    parts.Fold: _fold,
    parts.Lines: _chart,
    parts.Bars: _chart,
    parts.Scatter: _chart,
    Table: _table,
}
