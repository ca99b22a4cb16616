"""What takes long shows in the terminal how far it is: in the first process, and where somebody looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")
_is_shown: ContextVar[bool] = ContextVar("is_shown", default=False)


@contextmanager
def showing() -> Iterator[None]:
    """Let `steps` and `working` be seen meanwhile; elsewhere, as in functions that are called by themselves, not."""
    token = _is_shown.set(True)
    try:
        yield
    finally:
        _is_shown.reset(token)


def steps(found: Iterable[T], what: str) -> Iterator[T]:
    """Yield what is gone through, with a bar on a terminal.

    Args:
        found: its length is shown where it has one.
        what: is being done.

    Example:
        >>> list(steps([1, 2], "counting"))
        [1, 2]
    """
    with _bar(is_counted=True) as progress:
        if progress is None:
            yield from found
            return
        total = len(found) if isinstance(found, Sized) else None
        task = progress.add_task(what, total=total)
        for step in found:
            yield step
            progress.advance(task)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is going on, where nobody knows how long it takes."""
    with _bar(is_counted=False) as progress:
        if progress is not None:
            progress.add_task(what, total=None)
        yield


@contextmanager
def _bar(*, is_counted: bool) -> Iterator[Any]:
    """Open a bar below what the terminal shows already, or None where there is nobody to see it."""
    console = _terminal()
    if console is None:
        yield None
        return
    from rich import progress as parts
    from rich.errors import LiveError

    counted = (parts.BarColumn(bar_width=30), parts.MofNCompleteColumn()) if is_counted else ()
    columns = (
        parts.SpinnerColumn(),
        parts.TextColumn("{task.description}"),
        *counted,
        parts.TimeElapsedColumn(),
    )
    progress = parts.Progress(*columns, console=console, transient=True)
    try:
        progress.start()
    except LiveError:  # another display is there, and this version of rich shows one at a time
        yield None
        return
    try:
        yield progress
    finally:
        progress.stop()


def _terminal() -> Console | None:
    if not _is_shown.get() or not is_first_process():
        return None
    from rich import get_console

    console = get_console()
    is_seen = console.is_jupyter or (console.file.isatty() and not console.is_dumb_terminal)
    return console if is_seen else None


def is_first_process() -> bool:
    """Whether this process is the one that speaks: under DDP, the others are quiet."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return all(os.environ.get(name, "0") in ("", "0") for name in RANKS)
