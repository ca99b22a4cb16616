"""Names by pattern: a glob, or a regular expression after `re:`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import accumulate

from lightning_prune.core.checks import did_you_mean

REGEX_PREFIX = "re:"


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter, or a module above it.

    Args:
        pattern: a glob (`*`, `?`, `[...]`; a star also crosses dots), or `re:` and a regular expression that has to
            match the whole of the name.
        name: fully qualified parameter name. A glob is tried on it and on each module path that it begins with.

    Example:
        >>> [matches(pattern, "encoder.0.weight") for pattern in ("encoder", "*.0", "enc")]
        [True, True, False]
        >>> matches(r"re:encoder\\.\\d+\\.weight", "encoder.0.weight")
        True
    """
    if pattern.startswith(REGEX_PREFIX):
        return re.fullmatch(pattern.removeprefix(REGEX_PREFIX), name) is not None
    return any(fnmatchcase(path, pattern) for path in accumulate(name.split("."), "{}.{}".format))


def check_patterns(name: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Refuse what is no pattern before any model is there.

    Raises:
        ValueError: an entry is no text, is empty, or is no valid regular expression.
    """
    if isinstance(patterns, str):
        raise ValueError(
            f"`{name}` is a list of patterns, but got the text {patterns!r}: write [{patterns!r}]."
        )
    for pattern in (found := tuple(patterns)):
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(
                f"`{name}` holds globs, or regular expressions after `re:`, but got {pattern!r}."
            )
        if pattern.startswith(REGEX_PREFIX):
            try:
                re.compile(pattern.removeprefix(REGEX_PREFIX))
            except re.error as error:
                raise ValueError(f"`{name}` holds a bad regular expression, {pattern!r}: {error}.") from error
    return found


def check_match(argument: str, pattern: str, names: Iterable[str]) -> None:
    """Refuse a pattern that matches nothing, and name the candidates.

    Raises:
        ValueError: none of `names` matches.

    Example:
        >>> check_match("exclude", "head", ["0.weight", "2.weight"])
        Traceback (most recent call last):
        ...
        ValueError: `exclude` has a pattern that matches no weight: 'head'. The candidates are 0.weight, 2.weight.
    """
    known = list(names)
    if not any(matches(pattern, name) for name in known):
        paths = [path for name in known for path in accumulate(name.split("."), "{}.{}".format)]
        by_last_part = {path.rpartition(".")[2]: path for path in reversed(paths)}
        near = did_you_mean(pattern, by_last_part | {path: path for path in paths})
        raise ValueError(
            f"`{argument}` has a pattern that matches no weight: {pattern!r}.{near} "
            f"The candidates are {listed(known) or 'none'}."
        )


def listed(names: Iterable[str], num_shown: int = 20) -> str:
    """Write names in a row, the rest of a long list as a count.

    Example:
        >>> listed(["a", "b", "c"], num_shown=2)
        'a, b and 1 more'
    """
    known = list(names)
    rest = len(known) - num_shown
    return ", ".join(known[:num_shown]) + (f" and {rest} more" if rest > 0 else "")


def listed_reasons(reasons: Mapping[str, str], num_shown: int = 5) -> str:
    """Write names with reasons in a row: each reason once, after the names that it is of.

    Example:
        >>> listed_reasons({"a": "too small", "b": "fixed", "c": "too small", "d": "unknown"}, num_shown=2)
        '`a`, `c` (too small), `b` (fixed) and 1 more'
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(f"`{name}`")
    return listed([f"{listed(found, num_shown=3)} ({why})" for why, found in names.items()], num_shown)
