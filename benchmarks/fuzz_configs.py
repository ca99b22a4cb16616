"""Thousands of random configurations of the command line: `python -m benchmarks.fuzz_configs --num 6000`.

Each (benchmarks/random_configs.py) is composed from `conf/` and run in this process, as `python train.py` would: it
runs and reaches what was asked for, or it is refused before the first optimizer step by an error that is shown without
a traceback. `late` is a clear error that comes after steps were taken, since only the run could show it; `unclear` is a
broken promise. Those are printed with their overrides.
"""

from __future__ import annotations

import logging
import re
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.blocks import Block, Ledger, run_seeds, seeds_of
from benchmarks.random_configs import Unclear, dense_checkpoint, random_job, run
from benchmarks.record import table

OUTCOMES = ("ran", "refused", "late", "unclear")
SECONDS = 600  # of wall time for one job, on a busy machine


def attempt(seed: int, dense: str) -> dict[str, Any]:
    """Return what came of one seed, whatever it raises."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    job = random_job(seed)
    signal.signal(signal.SIGALRM, out_of_time)
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


def out_of_time(*_: Any) -> None:
    raise TimeoutError(f"{SECONDS} s were not enough")


def reason(said: str) -> str:
    """Return a refusal without values, to count alike ones together."""
    return re.sub(r"['\"\[(].*|[\d.]+", "", said.partition("\n")[0])[:60].strip()


def trials(key: str) -> Block:
    """Return what came of a block of seeds."""
    with tempfile.TemporaryDirectory() as folder:
        logging.disable(logging.CRITICAL)
        dense = dense_checkpoint(Path(folder))
        rows = [attempt(seed, dense) for seed in seeds_of(key)]
    return {
        "outcomes": Counter(row["outcome"] for row in rows),
        "refused": Counter(reason(row["said"]) for row in rows if row["outcome"] == "refused"),
        "sums": {"steps": sum(row.get("steps", 0) for row in rows)},
        "failed": [row for row in rows if row["outcome"] in ("late", "unclear")],
    }


def summary(ledger: Ledger) -> str:
    outcomes, refused = ledger.counts("outcomes"), ledger.counts("refused")
    row = {"configurations": outcomes.total(), **{outcome: outcomes[outcome] for outcome in OUTCOMES}}
    row |= {"steps": ledger.counts("sums")["steps"]}
    seconds = sum(block["cpu_s"] for block in ledger.blocks.values())
    whole = table([{name: f"{number:,}" for name, number in row.items()} | {"CPU s": f"{seconds:.0f}"}])
    return f"{whole}\n\n{table([{'refused because': why, 'times': str(n)} for why, n in refused.most_common(20)])}"


if __name__ == "__main__":
    run_seeds("fuzz_configs", __doc__, 6000, trials, summary)
