"""Checks of user input, one wording for one kind of mistake: what it is, its range, what was got."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path


def check_number(name: str, value: object, what: str = "a number") -> float:
    """Return `value` as a float, or refuse what is no finite number.

    Raises:
        ValueError: for booleans, text, NaN and infinities.

    Example:
        >>> check_number("power", 3)
        3.0
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` is {what}, but got {value!r}.{_advice(value, float)}")
    return float(value)


def check_sparsity(name: str, value: object) -> float:
    """Refuse what is no sparsity, the fraction removed: 0 removes nothing, 1 would remove everything.

    Raises:
        ValueError: unless 0 <= `value` < 1.

    Example:
        >>> check_sparsity("sparsity", 0.9)
        0.9
    """
    return check_range(name, value, 0.0, 1.0, "a sparsity, the fraction removed, in [0, 1)", open_end=True)


def check_fraction(name: str, value: object) -> float:
    """Refuse what lies outside of [0, 1].

    Example:
        >>> check_fraction("progress", 1)
        1.0
    """
    return check_range(name, value, 0.0, 1.0, "a fraction in [0, 1]")


def check_positive(name: str, value: object) -> float:
    """Refuse what is not above zero.

    Example:
        >>> check_positive("power", 3.0)
        3.0
    """
    return check_range(name, value, 0.0, math.inf, "a number above 0", open_start=True)


def check_range(
    name: str,
    value: object,
    low: float,
    high: float,
    what: str,
    *,
    open_start: bool = False,
    open_end: bool = False,
) -> float:
    """Refuse a number outside of [`low`, `high`], or with the ends left out where they are open."""
    number = check_number(name, value, what)
    above = number > low if open_start else number >= low
    below = number < high if open_end else number <= high
    if not (above and below):
        raise ValueError(f"`{name}` is {what}, but got {value!r}.")
    return number


def check_count(name: str, value: object, minimum: int) -> int:
    """Refuse what is no whole number of at least `minimum`.

    Example:
        >>> check_count("num_steps", 5, minimum=1)
        5
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"`{name}` is a whole number of at least {minimum}, but got {value!r}.{_advice(value, int)}"
        )
    return value


def _advice(value: object, kind: type) -> str:
    """Say how a number of another library's becomes one of Python's, which checkpoints and records can hold."""
    is_foreign = not isinstance(value, (bool, int, float)) and hasattr(value, "item")
    return f" Numbers are Python's: write {kind.__name__}(...)." if is_foreign else ""


def check_flag(name: str, value: object) -> bool:
    """Refuse what is neither True nor False: a word such as "no" would count as True.

    Example:
        >>> check_flag("report", False)
        False
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is True or False, but got {value!r}.")
    return value


def check_path(name: str, value: object) -> str | Path:
    """Refuse what is no path.

    Example:
        >>> check_path("folder", "runs")
        'runs'
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"`{name}` is a path, but got {value!r}.")
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Refuse what is none of `choices`, and say which of them comes nearest.

    Example:
        >>> check_choice("unit", "run", ("run", "steps"))
        'run'
    """
    known = list(choices)
    if value not in known:
        raise ValueError(f"`{name}` is one of {known}, but got {value!r}.{did_you_mean(str(value), known)}")
    return str(value)


def check_noun(name: str, value: object, example: str, *methods: str) -> None:
    """Refuse what does not do what a noun does: a plain value, or a class in place of one of its objects.

    Example:
        >>> check_noun("schedule", 0.5, "Linear()", "__call__")
        Traceback (most recent call last):
        ...
        ValueError: `schedule` is an object such as Linear(), but got 0.5.
    """
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        raise ValueError(f"`{name}` is an object such as {example}, but got {value!r}.")


def did_you_mean(word: str, candidates: Iterable[str] | Mapping[str, str], num_shown: int = 3) -> str:
    """Name the candidates nearest to a word that was not found, as the end of an error message.

    A mapping says what is shown for each candidate.

    Example:
        >>> did_you_mean("net.0.wieght", ["net.0.weight", "embedding"])
        ' Did you mean net.0.weight?'
    """
    near = difflib.get_close_matches(word, list(candidates), n=num_shown)
    shown = dict.fromkeys(candidates[name] if isinstance(candidates, Mapping) else name for name in near)
    return f" Did you mean {' or '.join(shown)}?" if near else ""
