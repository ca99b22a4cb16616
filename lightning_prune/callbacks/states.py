"""States that callbacks find in a checkpoint, which somebody may have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L


@contextmanager
def restoring(callback: L.Callback) -> Iterator[None]:
    """Say whose state is at fault where a checkpoint lacks some of it, or holds something else in its place.

    Args:
        callback: which reads its state inside.

    Raises:
        ValueError: it found no value, or one of another kind.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"holds something else: {error}"
        raise ValueError(
            f"`ckpt_path` holds a state of {type(callback).__name__} as it was saved, but this one {what}. Resume from "
            "another checkpoint."
        ) from error
