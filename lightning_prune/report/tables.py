"""A report as it is shown: tables of text, and the page that holds them."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LAYERS = 40
MAX_UPDATES = 10


@dataclass(frozen=True)
class Table:
    """A table of text: the first column names, the others hold numbers. A page may sort it by any of them.

    `spare` are columns that a narrow terminal leaves out, the first ones first.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_sortable: bool = False
    spare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A report as it is shown: facts (label, text), tables, warnings, notes."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
