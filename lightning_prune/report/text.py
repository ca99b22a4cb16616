"""Numbers as text, for people: short, aligned, and never rounded into a claim."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "-"
WHOLE_BELOW = 10_000_000


def percent(fraction: float | None) -> str:
    """Return a fraction as text that never rounds to all or nothing.

    Example:
        >>> percent(0.9), percent(0.99999), percent(1.0), percent(0.00001)
        ('90.00 %', '> 99.99 %', '100.00 %', '< 0.01 %')
    """
    if fraction is None:
        return UNKNOWN
    if 0.99995 <= fraction < 1.0:
        return "> 99.99 %"
    return "< 0.01 %" if 0.0 < fraction < 0.00005 else f"{100.0 * fraction:.2f} %"


def counts(*values: int | None) -> tuple[str, ...]:
    """Return counts as text in one unit: whole numbers where all are below ten million.

    Example:
        >>> counts(266610, 27050), counts(25557032, 2555703, None)
        (('266,610', '27,050'), ('25.56 M', '2.56 M', '-'))
        >>> counts(25557032, 640, 0)
        ('25.56 M', '< 0.01 M', '0.00 M')
    """
    largest = max((value for value in values if value is not None), default=0)
    if largest < WHOLE_BELOW:
        return tuple(UNKNOWN if value is None else f"{value:,}" for value in values)
    place = _place(largest, " kMGTPE")
    return tuple(UNKNOWN if value is None else _scaled(value, place, " kMGTPE") for value in values)


def size(value: int | None) -> str:
    """Return a number of bytes as text, in powers of 1000.

    Example:
        >>> size(812), size(1068210), size(None)
        ('812 B', '1.07 MB', '-')
    """
    if value is None or value < 1000:
        return UNKNOWN if value is None else f"{value} B"
    return f"{_scaled(value, _place(value, ' kMGTPE'), ' kMGTPE')}B"


def number(value: float | None) -> str:
    """Return a metric as text.

    Example:
        >>> number(0.98432), number(0.000123), number(31415.9), number(None)
        ('0.9843', '0.000123', '3.142e+04', '-')
    """
    if value is None:
        return UNKNOWN
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.4g}"


def change(old: int | None, new: int | None) -> str:
    """Return by how much a count has changed.

    Example:
        >>> change(200, 50), change(7, 7), change(7, None)
        ('-75.0 %', 'same', '-')
    """
    if old is None or new is None:
        return UNKNOWN
    if old == new:
        return "same"
    return f"{100.0 * (new - old) / old:+.1f} %" if old else f"+{new:,}"


def elided(rows: Sequence[tuple[str, ...]], limit: int) -> tuple[tuple[str, ...], ...]:
    """Leave out the middle of what is longer than `limit`, and say how much.

    Example:
        >>> elided([("a", "1"), ("b", "2"), ("c", "3"), ("d", "4")], limit=2)
        (('a', '1'), ('... 2 more ...', ''), ('d', '4'))
    """
    if len(rows) <= limit:
        return tuple(rows)
    tail = limit // 2
    between = (f"... {len(rows) - limit:,} more ...", *[""] * (len(rows[0]) - 1))
    return (*rows[: limit - tail], between, *rows[len(rows) - tail :])


def _place(value: int, prefixes: str) -> int:
    return min(int(math.log10(value)) // 3, len(prefixes) - 1)


def _scaled(value: int, place: int, prefixes: str) -> str:
    text = f"{value / 1000.0**place:.2f} {prefixes[place]}"
    return f"< {text.replace('0.00', '0.01')}" if value and text.startswith("0.00") else text
