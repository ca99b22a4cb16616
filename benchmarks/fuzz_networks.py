"""Structured pruning of random networks by random recipes: `python -m benchmarks.fuzz_networks --num 3000`.

Each network (benchmarks/zoo/random_networks.py) is pruned in one shot, in several updates with resumes between, or
within `Trainer.fit`, whose checkpoints are loaded and gone on with (benchmarks/zoo/random_fits.py), and compared in
float64 with an independent reference, the dense network whose removed slices are absent
(benchmarks/zoo/random_pruning.py says what else has to hold). `wrong` breaks a promise; `crash` is any error that does
not say what is wrong. Both are printed with their seed: `--first SEED --num 1` runs one again.
"""

from __future__ import annotations

import re
import signal
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.blocks import Block, Ledger, run_seeds, seeds_of
from benchmarks.record import table
from benchmarks.zoo.random_pruning import fuzz
from benchmarks.zoo.verdicts import VISIBLE, WrongError

OUTCOMES = ("equal", "nothing removed", "refused", "wrong", "crash")
SECONDS = 300  # of wall time for one network, on a busy machine


def run(seed: int) -> dict[str, Any]:
    """Return what came of one seed, whatever it raises."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(SECONDS)
    try:
        return {"seed": seed} | fuzz(seed)
    except WrongError as error:
        return {"seed": seed, "outcome": "wrong", "why": str(error)}
    except Exception as error:  # the outcome that must not be
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return {"seed": seed, "outcome": "crash", "why": f"{type(error).__name__}: {error} ({place})"}
    finally:
        signal.alarm(0)


def out_of_time(*_: Any) -> None:
    raise TimeoutError(f"{SECONDS} s were not enough")


def reason(why: str) -> str:
    """Return a refusal without names and numbers, to count alike ones together."""
    return re.sub(r"\(.*?\)|`?steps\S+|[\d.]+", "", why)[:48].strip()


def trials(key: str) -> Block:
    """Return what came of a block of seeds."""
    rows = [run(seed) for seed in seeds_of(key)]
    controls = [row["control"] for row in rows if row.get("control") == row.get("control", 0.0)]
    return {
        "outcomes": Counter(row["outcome"] for row in rows),
        "refused": Counter(reason(row["why"]) for row in rows if row["outcome"] == "refused"),
        "sums": {
            "pieces": sum(row.get("pieces", 0) for row in rows),
            "controls": len(controls),
            "visible controls": sum(control > VISIBLE for control in controls),
        },
        "largest error": max((row.get("error", 0.0) for row in rows), default=0.0),
        "failed": [row for row in rows if row["outcome"] in ("wrong", "crash")],
    }


def summary(ledger: Ledger) -> str:
    outcomes, refused = ledger.counts("outcomes"), ledger.counts("refused")
    row = {"networks": outcomes.total(), **{outcome: outcomes[outcome] for outcome in OUTCOMES}}
    row |= ledger.counts("sums")
    largest = max(block["largest error"] for block in ledger.blocks.values())
    seconds = sum(block["cpu_s"] for block in ledger.blocks.values())
    cells = {name: f"{number:,}" for name, number in row.items()}
    whole = table([cells | {"largest error": f"{largest:.1e}", "CPU s": f"{seconds:.0f}"}])
    return f"{whole}\n\n{table([{'refused because': why, 'times': str(n)} for why, n in refused.most_common(12)])}"


if __name__ == "__main__":
    run_seeds("fuzz_networks", __doc__, 3000, trials, summary)
