"""How a report is shown: in the terminal, and as markdown and a page beside its JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.report import rows, tables
from lightning_prune.report.data import Report
from lightning_prune.report.fitting import Fitting
from lightning_prune.report.page.html import to_html
from lightning_prune.report.page.sections import document
from lightning_prune.report.storage import save, write_text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
PAGE_NAME = "report.html"


def to_rich(report: Report) -> Group:
    """Return the report for the terminal, what matters most last: `rich.print(to_rich(report))`."""
    return page_to_rich(rows.page(report))


def page_to_rich(page: tables.Page) -> Group:
    """Return a page for the terminal, its tables from the last to the first."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    panel = Panel(_grid(page.facts), title=Text(page.title, style="bold"), title_align="left", padding=(1, 2))
    warnings = _grid([("!", text) for text in page.warnings], "yellow")
    notes = _grid([("*", text) for text in page.notes], "dim")
    return Group(panel, *(_fitting(table) for table in reversed(page.tables)), warnings, notes)


def to_markdown(report: Report) -> str:
    """Return the report as markdown (GitHub's), the same rows as in the terminal."""
    page = rows.page(report)
    facts = "\n".join(f"- **{_escaped(label)}**: {_escaped(text)}" for label, text in page.facts)
    parts = [f"# {page.title}", facts, *(_markdown_table(table) for table in page.tables)]
    if page.warnings:
        parts += ["## Warnings", "\n".join(f"- {_escaped(warning)}" for warning in page.warnings)]
    if page.notes:
        parts += ["## Notes", "\n".join(f"- {_escaped(note)}" for note in page.notes)]
    if report.environment:
        known = ", ".join(f"{_escaped(name)} {_escaped(text)}" for name, text in report.environment.items())
        parts += ["## Environment", known]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_page(report: Report) -> str:
    """Return the report as one HTML page, with its plots, that needs no other file and no network."""
    return to_html(document(report))


def write(report: Report, folder: str | Path) -> tuple[Path, Path, Path]:
    """Write `report.json`, `report.md` and `report.html` into `folder`, each whole or not at all; return their paths.

    Raises:
        ValueError: the report holds what cannot be written; nothing is.
        OSError: the folder cannot be written.
    """
    text, page, folder = to_markdown(report), to_page(report), Path(folder)
    return (
        save(report, folder / JSON_NAME),
        write_text(folder / MARKDOWN_NAME, text),
        write_text(folder / PAGE_NAME, page),
    )


def _grid(pairs: Iterable[tuple[str, str]], style: str = "") -> RichTable:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=style or "bold", no_wrap=True)
    grid.add_column(style=style, overflow="fold")
    for label, text in pairs:
        grid.add_row(Text(label), Text(text))
    return grid


def _fitting(table: tables.Table) -> Fitting:
    def make(left_out: Sequence[str]) -> RichTable:
        held = [i for i, column in enumerate(table.columns) if column not in left_out]
        columns = tuple(table.columns[i] for i in held)
        return _rich_table(
            tables.Table(table.title, columns, tuple(tuple(row[i] for i in held) for row in table.rows))
        )

    return Fitting(make, table.spare)


def _rich_table(table: tables.Table) -> RichTable:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def _markdown_table(table: tables.Table) -> str:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [table.columns, rule, *table.rows]
    body = "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)
    return f"## {table.title}\n\n{body}"


def _escaped(text: str) -> str:
    """Let nothing in a name or a message be taken for markdown; underscores within words are none."""
    text = re.sub(r"([\\`*<>|\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)
    return " ".join(text.split())
