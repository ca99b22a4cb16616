"""Structured pruning of random networks by random recipes: `python -m benchmarks.fuzz_networks --num 3000`.

Each network (benchmarks/zoo/random_networks.py) is pruned in one shot, or in several updates with resumes between,
and compared in float64 with an independent reference, the dense network whose removed slices are absent
(benchmarks/zoo/random_pruning.py says what else has to hold). `wrong` breaks a promise; `crash` is any error that does
not say what is wrong. Both are printed with their seed: `--first SEED --num 1` runs one again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import signal
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import facts, table, write
from benchmarks.zoo.random_pruning import VISIBLE, WrongError, fuzz

OUTCOMES = ("equal", "nothing removed", "refused", "wrong", "crash")
SECONDS = 300  # of wall time for one network, on a busy machine


def run(seed: int) -> dict[str, Any]:
    """Return what came of one seed, whatever it raises."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
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


def reason(why: str) -> str:
    """Return a refusal without names and numbers, to count alike ones together."""
    return re.sub(r"\(.*?\)|`?steps\S+|[\d.]+", "", why)[:48].strip()


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(row["outcome"] for row in rows)
    controls = [row["control"] for row in rows if row.get("control") == row.get("control", 0.0)]
    return {
        "networks": len(rows),
        "pieces": sum(row.get("pieces", 0) for row in rows),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "largest error": max((row.get("error", 0.0) for row in rows), default=0.0),
        "controls": len(controls),
        "visible controls": sum(control > VISIBLE for control in controls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=3000, help="number of networks")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with multiprocessing.get_context("fork").Pool(options.processes, maxtasksperchild=100) as pool:
        for row in pool.imap_unordered(run, range(options.first, options.first + options.num)):
            rows.append(row)
            if row["outcome"] in ("wrong", "crash"):
                print(f"seed {row['seed']}: {row['outcome']}: {row['why'][:300]}", flush=True)
    found = summary(rows)
    refused = Counter(reason(row["why"]) for row in rows if row["outcome"] == "refused")
    failed = [row for row in rows if row["outcome"] in ("wrong", "crash")]
    print(table([{name: f"{v:.1e}" if isinstance(v, float) else str(v) for name, v in found.items()}]))
    print(
        table(
            [{"refused because": why, "times": str(n)} for why, n in refused.most_common(12)]
            or [{"refused": "-"}]
        )
    )
    record = facts(options.first) | {"found": found, "refused": dict(refused), "failed": failed}
    print(write("fuzz_networks", record).name)


if __name__ == "__main__":
    main()
