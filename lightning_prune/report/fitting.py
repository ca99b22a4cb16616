"""Tables as wide as the terminal: where one is too wide, columns that can be spared are left out, and it is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

ANY = 10_000  # wider than any terminal


@dataclass(frozen=True)
class Fitting:
    """A table that is made when it is known how wide it may be: `rich.print` it.

    Args:
        make: names of the columns that are left out -> the table.
        spare: columns that can be left out, the first ones first.
    """

    make: Callable[[Sequence[str]], Table]
    spare: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.measure import Measurement
        from rich.text import Text

        for num in range(len(self.spare) + 1):
            table, left_out = self.make(self.spare[:num]), self.spare[:num]
            if Measurement.get(console, options.update_width(ANY), table).maximum <= options.max_width:
                break
        yield table
        if left_out:
            yield Text(f"too wide for this terminal: {', '.join(left_out)}", style="dim")
