"""Trials in blocks, each on file as soon as it is done, so that a run may be stopped and gone on with.

A results file holds the facts of the last run and, by block, what came of its trials, at which commit, and what it
took. Blocks are processes of their own, forked from this one.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import resource
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, facts, revision

Block = dict[str, Any]
"""Counts by name, as dicts from what is counted to how often; and what `failed`, as rows with their seeds."""


class Ledger:
    """The results file of a benchmark.

    Args:
        path: where it lies, or is to.
        head: facts of this run.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.blocks: dict[str, Block] = json.loads(path.read_text())["blocks"] if path.is_file() else {}

    def run(self, keys: Sequence[str], trials: Callable[[str], Block], options: Any) -> None:
        """Run the blocks that are missing, no new one once the seconds are over; with `redo`, those that failed too."""
        end = time.monotonic() + options.seconds
        missing = [k for k in keys if k not in self.blocks or (options.redo and self.blocks[k]["failed"])]
        at = revision()  # before workers are forked, which would inherit the pipe that git answers through
        with multiprocessing.get_context("fork").Pool(options.processes, maxtasksperchild=1) as pool:
            for place in range(0, len(missing), options.processes):
                if time.monotonic() > end:
                    print(f"{len(missing) - place} blocks are left: run it again", flush=True)
                    return
                some = missing[place : place + options.processes]
                made = pool.map(_Timed(trials), some, chunksize=1)
                self.store({key: {"revision": at} | block for key, block in zip(some, made, strict=True)})

    def store(self, blocks: dict[str, Block]) -> None:
        for row in (row for block in blocks.values() for row in block["failed"]):
            print(str(row)[:600], flush=True)
        self.blocks |= blocks
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.head | {"blocks": self.blocks}, indent=1) + "\n")
        new.replace(self.path)

    def counts(self, name: str) -> Counter[str]:
        """Return what all blocks have counted under a name."""
        return sum((Counter(block.get(name, {})) for block in self.blocks.values()), Counter())

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for block in self.blocks.values() for row in block["failed"]]


class _Timed:
    """Runs the trials of a block, and adds the CPU seconds that they took, processes of theirs included."""

    def __init__(self, trials: Callable[[str], Block]) -> None:
        self.trials = trials

    def __call__(self, key: str) -> Block:
        gc.freeze()
        gc.disable()  # a fifth of the time goes into looking for cycles, and the process ends with the block
        block = self.trials(key)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return block | {"cpu_s": round(sum(found.ru_utime + found.ru_stime for found in used), 1)}


def parser(name: str, text: str | None) -> ArgumentParser:
    """Return a parser with what all of them take."""
    made = ArgumentParser(description=text, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--processes", type=int, default=1)
    made.add_argument("--seconds", type=float, default=float("inf"), help="start no block after these")
    made.add_argument("--redo", action="store_true", help="run blocks again in which something failed")
    made.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return made


def run_seeds(
    name: str, text: str | None, num: int, trials: Callable[[str], Block], summary: Callable[[Ledger], str]
) -> None:
    """Run blocks of seeds as the command line says, and print what came of them."""
    options = parser(name, text)
    options.add_argument("--num", type=int, default=num, help="how many")
    options.add_argument("--first", type=int, default=0, help="the first seed")
    found = options.parse_args()
    ledger = Ledger(found.out, facts(found.first))
    ledger.run(keys_of(found.first, found.num), trials, found)
    print(summary(ledger))


def seeds_of(key: str) -> range:
    """Return the seeds of a block such as "100-199"."""
    first, last = map(int, key.split("-"))
    return range(first, last + 1)


def keys_of(first: int, num: int, size: int = 100) -> list[str]:
    """Return the blocks of so many seeds.

    >>> keys_of(0, 250)
    ['0-99', '100-199', '200-249']
    """
    end = first + num
    return [f"{low}-{min(low + size, end) - 1}" for low in range(first, end, size)]
