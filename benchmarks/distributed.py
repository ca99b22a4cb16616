"""Pruning in several processes: what is compared between ranks, strategies and resumed runs, and how much differs.

    python -m benchmarks.distributed

The trainings are those of tests/callbacks/ddp_run.py and sharded_run.py, in two and in four processes over gloo, and
of ddp_beside_run.py, in two, each rank with data of its own. Counted are tensors that are compared bit for bit (a
mask, a weight, a moment of the optimizer) and records of updates; batch-norm statistics, which DDP leaves to each
rank, are not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, facts, revision, table
from lightning_prune.report.storage import write_text
from tests.callbacks.ddp_run import run as one_process

State = Mapping[str, Any]
SCRIPTS = Path(__file__).resolve().parents[1] / "tests" / "callbacks"


def launch(script: str, folder: Path, num_processes: int, *arguments: str) -> None:
    """Run one of the scripts in processes that belong together."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    subprocess.run(
        [sys.executable, "-W", "ignore", *words, str(SCRIPTS / script), str(folder), *arguments],
        check=True,
        capture_output=True,
    )


def state(folder: Path, name: str, rank: int) -> State:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)  # type: ignore[no-any-return]


def moments(found: State) -> Mapping[str, torch.Tensor]:
    kept = found["moments"]
    return kept if isinstance(kept, Mapping) else {str(i): moment for i, moment in enumerate(kept)}


def differences(first: State, second: State) -> Iterator[tuple[str, bool]]:
    """Yield for each thing that two ranks or runs have what it is, and whether it differs."""
    for kind, of in (("masks", dict), ("weights", dict), ("moments", None)):
        ours, theirs = (moments(s) if of is None else s[kind] for s in (first, second))
        for name in ours.keys() | theirs.keys():
            if "running" not in name:
                yield (
                    kind,
                    name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]),
                )
    yield "updates", first["updates"] != second["updates"]


def compared(what: str, ranks: int, found: list[tuple[State, State]]) -> dict[str, Any]:
    """Count over pairs of states."""
    row: dict[str, Any] = {"what": what, "ranks": ranks, "pairs": len(found)}
    row |= dict.fromkeys(("masks", "weights", "moments", "updates", "different"), 0)
    for first, second in found:
        for kind, is_different in differences(first, second):
            row[kind] += 1
            row["different"] += is_different
    return row


def pairs(
    folder: Path, names: Iterable[tuple[str, str]], ranks: range, first_of: int | None = None
) -> list[tuple[State, State]]:
    """Return the states of two runs on each rank, or the first run's of one rank beside the second's of each."""
    return [
        (state(folder, first, rank if first_of is None else first_of), state(folder, second, rank))
        for first, second in names
        for rank in ranks
    ]


def cases(folder: Path, kind: str) -> list[str]:
    """Return the cases that a folder has runs of a kind of."""
    return sorted({path.name.rpartition(f"-{kind}-")[0] for path in folder.glob(f"*-{kind}-0.pt")})


def ddp(folder: Path, ranks: int, beside: str = "") -> list[dict[str, Any]]:
    """Compare each rank with the first, and the resumed run with the whole one; say what else the runs have."""
    whole = [(f"{case}-whole", f"{case}-whole") for case in cases(folder, "whole")]
    resumed = [(f"{case}-whole", f"{case}-resumed") for case in cases(folder, "resumed")]
    of_ranks, again = pairs(folder, whole, range(1, ranks), 0), pairs(folder, resumed, range(ranks))
    return [
        compared(f"DDP{beside}, {len(whole)} cases: ranks", ranks, of_ranks),
        compared(f"DDP{beside}, {len(resumed)} cases: resumed and whole", ranks, again),
    ]


def sharded(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Compare FSDP2 with DDP, and the resumed runs with the whole ones."""
    both = [(f"{case}-ddp", f"{case}-sharded") for case in cases(folder, "sharded") if case != "early"]
    resumed = [(f"local-{kind}", f"local-{kind}-resumed") for kind in ("sharded", "full")]
    beside, again = pairs(folder, both, range(ranks), 0), pairs(folder, resumed, range(ranks))
    return [
        compared(f"FSDP2, {len(both)} cases: beside DDP", ranks, beside),
        compared("FSDP2, sharded and full checkpoint: resumed and whole", ranks, again),
    ]


def main() -> None:
    """Train, compare, print the table and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the trainings' files go; by default nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        one_process("magnitude", folder / "ddp" / "one")  # from which two ranks go on
        for script, out in (("ddp_run.py", folder / "ddp"), ("sharded_run.py", folder / "sharded")):
            for ranks in (2, 4):
                launch(script, out, ranks)
        rows = [*ddp(folder / "ddp", 2), *ddp(folder / "ddp" / "four", 4)]
        (folder / "beside").mkdir(parents=True, exist_ok=True)
        launch("ddp_beside_run.py", folder / "beside", 2, "two")
        rows += ddp(folder / "beside", 2, " with more beside it")
        rows += sharded(folder / "sharded", 2)
    record = {**facts(0), "revision": revision(), "rows": rows}
    write_text(RESULTS / "distributed.json", f"{json.dumps(record, indent=1)}\n")
    print(table([{key: str(value) for key, value in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
