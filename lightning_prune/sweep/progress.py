"""How far a sweep is, in the terminal, read from its folder: it does not matter where its jobs run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from lightning_prune.sweep.notes import METRICS_FILE, SWEEP_FILE, read_note, status_of
from lightning_prune.sweep.rows import Row, default_metric, is_lower_better
from lightning_prune.sweep.terminal import number_text

SECONDS = 0.5
ENDED = ("done", "failed")


class Progress:
    """Watches a sweep's folder in a thread, and shows jobs done of all and the best so far.

    Args:
        folder: of the sweep.
        metric: the column of quality; by default the usual one.
        mode: "min" or "max", what is better of it; by default as its name says.
        is_shared: whether jobs write into the same terminal: then there is a line for each job that ends, not a bar
            that stays at the bottom.
    """

    def __init__(
        self, folder: Path, metric: str | None = None, mode: str | None = None, *, is_shared: bool = False
    ) -> None:
        self.folder, self.metric, self.mode, self.is_shared = folder, metric, mode, is_shared
        self._ended: dict[str, Row] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep-progress", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Look once more, and end."""
        if not self._end.is_set():
            self._end.set()
            if self._thread.is_alive():
                self._thread.join(timeout=5)

    def look(self) -> tuple[int, int, str]:
        """Return how many jobs have ended, how many there are, and a text that says so with the best so far."""
        note = read_note(self.folder / SWEEP_FILE)
        for job in note.get("jobs", {}):
            if self._ended.get(job, {}).get("status") != "done":  # what failed may be tried again
                status = status_of(self.folder / job)
                metrics = read_note(self.folder / job / METRICS_FILE) if status == "done" else {}
                self._ended[job] = {"job": job, "status": status, **metrics}
        rows = [row for row in self._ended.values() if row["status"] in ENDED]
        done = sum(row["status"] == "done" for row in rows)
        failed = f", {len(rows) - done} failed" if done < len(rows) else ""
        num_jobs = int(note.get("num_jobs", 0))
        text = f"{done} of {num_jobs} jobs done{failed}{self._best(rows)}" if num_jobs else "starting"
        return len(rows), num_jobs, text

    def _best(self, rows: list[Row]) -> str:
        metric = self.metric or default_metric(rows)
        known = [row for row in rows if metric in row]
        if metric is None or not known:
            return ""
        best = (min if is_lower_better(metric, self.mode) else max)(known, key=lambda row: float(row[metric]))
        return f"; best {metric} {number_text(best, metric)} (job {best['job']})"

    def _watch(self) -> None:
        from rich.console import Console

        console = Console()
        if self.is_shared or not console.is_terminal:
            self._write_lines(console)
        else:
            self._draw_bar(console)

    def _write_lines(self, console: Any) -> None:
        seen = -1
        while True:
            is_last = self._end.wait(SECONDS)
            ended, num_jobs, text = self.look()
            if ended != seen and num_jobs and (ended or seen >= 0):
                console.print(f"sweep: {text}", markup=False, highlight=False, soft_wrap=True)
            seen = ended
            if is_last:
                return

    def _draw_bar(self, console: Any) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Bar(*columns, console=console) as bar:
            task = bar.add_task("sweep", total=None)
            while True:
                is_last = self._end.wait(SECONDS)
                ended, num_jobs, text = self.look()
                bar.update(task, total=num_jobs or None, completed=ended, description=text)
                if is_last:
                    return
