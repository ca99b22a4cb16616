"""Thousands of random configurations of the command line: `python -m benchmarks.fuzz_configs --num 6000`.

Each (benchmarks/random_configs.py) is composed from `conf/` and run in this process, as `python train.py` would: it
runs and reaches what was asked for, or it is refused before the first optimizer step by an error that is shown without
a traceback. `late` is a clear error that comes after steps were taken, since only the run could show it; `unclear` is a
broken promise. Those are printed with their overrides.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_configs import Unclear, dense_checkpoint, random_job, run
from benchmarks.record import facts, table, write

OUTCOMES = ("ran", "refused", "late", "unclear")
SECONDS = 600  # of wall time for one job, on a busy machine


def attempt(seed: int, dense: str) -> dict[str, Any]:
    """Return what came of one seed, whatever it raises."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    job = random_job(seed)
    signal.alarm(SECONDS)
    try:
        found = run(job, dense)
    except Unclear as error:
        found = {"outcome": "unclear", "said": str(error)}
    except BaseException as error:  # what train.py would show as a traceback
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        found = {"outcome": "unclear", "said": f"{type(error).__name__}: {error} ({place})"}
    finally:
        signal.alarm(0)
    return {"seed": seed, "overrides": job.overrides} | found


def reason(said: str) -> str:
    """Return a refusal without values, to count alike ones together."""
    return re.sub(r"['\"\[(].*|[\d.]+", "", said.partition("\n")[0])[:60].strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=6000, help="number of configurations")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    rows = []
    dense = dense_checkpoint(Path(tempfile.mkdtemp()))
    seeds = range(options.first, options.first + options.num)
    with multiprocessing.get_context("fork").Pool(options.processes, maxtasksperchild=100) as pool:
        for row in pool.imap_unordered(partial(attempt, dense=dense), seeds):
            rows.append(row)
            if row["outcome"] in ("late", "unclear"):
                told = row["said"][:300].replace("\n", " ")
                print(f"seed {row['seed']}: {row['outcome']}: {told} {row['overrides']}", flush=True)
    counts = Counter(row["outcome"] for row in rows)
    refused = Counter(reason(row["said"]) for row in rows if row["outcome"] == "refused")
    steps = sum(row.get("steps", 0) for row in rows)
    print(
        table(
            [
                {"configurations": str(len(rows))}
                | {o: str(counts[o]) for o in OUTCOMES}
                | {"steps": str(steps)}
            ]
        )
    )
    print(
        table(
            [{"refused because": why, "times": str(n)} for why, n in refused.most_common(20)] or [{"": "-"}]
        )
    )
    failed = [row for row in rows if row["outcome"] in ("late", "unclear")]
    record = facts(options.first) | {"found": dict(counts), "refused": dict(refused), "failed": failed}
    print(write("fuzz_configs", record).name)


if __name__ == "__main__":
    main()
