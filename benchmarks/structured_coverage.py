"""Which models structured pruning makes smaller without changing what they compute, and which it breaks.

    python -m benchmarks.structured_coverage --tools ours torch-pruning

Each tool removes half of every group of channels of each model in benchmarks/zoo, in a process of its own with a limit
of CPU time. `equal`: in float64 the small model's outputs differ from those of the masked dense model by less than
1e-10 of their largest value; the control is the difference that one wrong index in one tensor makes (the least visible
of three tensors; all indices wrong, where five single ones feed units that are rectified away). What is in the results
file is not run again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import zoo
from benchmarks.record import RESULTS, facts, revision, table
from benchmarks.zoo.example import Example
from benchmarks.zoo.masked import difference, outputs64, reference
from benchmarks.zoo.slices import mistaken, recover, tensors_of, wrong_slices
from benchmarks.zoo.tools import TOOLS, NoHints

TOLERANCE = 1e-10
VISIBLE = 1e-6
OUTCOMES = ("equal", "wrong", "forward broken", "exception", "nothing pruned", "timeout", "no hints", "crash")
SECONDS_TO_CHECK = 300


def run(tool: str, name: str, seconds: int) -> dict[str, Any]:
    """Prune one model with one tool and say what came of it."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    example = zoo.build(name)
    dense = copy.deepcopy(example)
    row: dict[str, Any] = {}
    limit(seconds)
    try:
        kept = TOOLS[tool](example, row)
    except NoHints:
        return row | {"outcome": "no hints"}
    except Exception as error:  # whatever a tool raises is its outcome
        return row | {"outcome": "exception", "error": tail(error)}
    limit(SECONDS_TO_CHECK)
    before, after = num_params(dense), num_params(example)
    row["params"] = after / before
    if before == after:
        return row | {"outcome": "nothing pruned"}
    try:
        Example(copy.deepcopy(example.model).float(), example.args, example.kwargs).outputs()
    except Exception as error:  # whatever the model raises after pruning
        return row | {"outcome": "forward broken", "error": tail(error)}
    row["macs"] = num_macs(example) / num_macs(dense)
    return row | judge(tool, dense, example, kept)


def judge(tool: str, dense: Example, small: Example, kept: Any) -> dict[str, Any]:
    """Compare a small model with its reference, and wrong copies of it too."""
    try:
        kept = kept if kept is not None else recover(tensors_of(dense.model), small.model)
        found = outputs64(small)
    except ValueError as error:
        return {"outcome": "wrong", "error": tail(error)}
    expected, scale = reference(dense, kept), "dense"
    error = difference(found, expected)
    if tool != "ours" and error > TOLERANCE:
        live = reference(dense, kept, live_scale=True)
        if difference(found, live) < error:
            expected, error, scale = live, difference(found, live), "live"
    row = {"outcome": "equal" if error < TOLERANCE else "wrong", "relative_error": error, "scale": scale}
    if row["outcome"] == "equal":
        row["controls"] = controls(tensors_of(dense.model), small, kept, expected)
    return row


def controls(whole: Any, small: Example, kept: Any, expected: list[torch.Tensor]) -> dict[str, float]:
    """Return what one wrong index makes of the output, for three tensors.

    A channel that is rectified away for this input shows nothing, whatever its weights: up to five indices are tried,
    then all of them at once.
    """
    found: dict[str, float] = {}
    for name, dim in wrong_slices(whole, small.model, kept):
        num = len(kept[name][dim])
        for index in [*dict.fromkeys(num * i // 10 for i in (5, 2, 7, 0, 9)), None]:
            wrong = mistaken(whole[name], small.model, kept, (name, dim), index)
            error = difference(outputs64(Example(wrong, small.args, small.kwargs)), expected)
            place = f"{name}[{dim}]"
            found[place] = max(error, found.get(place, 0.0))
            if error > VISIBLE:
                break
    return found


def num_params(example: Example) -> int:
    return sum(parameter.numel() for parameter in example.model.parameters())


def num_macs(example: Example) -> int:
    model = copy.deepcopy(example.model).float().requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Example(model, example.args, example.kwargs).outputs()
    return counter.get_total_flops() // 2


def limit(seconds: int) -> None:
    """Let this process use so many more seconds of CPU time; the system then ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(
        resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, resource.RLIM_INFINITY)
    )


def tail(error: BaseException) -> str:
    """Return the end of an exception: its type and message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = [f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
    return f"{type(error).__name__}: {str(error)[:300]} ({' > '.join(places)})"


def in_own_process(tool: str, name: str, seconds: int) -> dict[str, Any]:
    """Run in a fork, so that a crash or a time limit ends one row only."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        try:
            row = run(tool, name, seconds)
        except Exception as error:  # the benchmark's own: an outcome that is not the tool's
            row = {"outcome": "crash", "error": tail(error)}
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        send.send(row)

    process = multiprocessing.get_context("fork").Process(target=work)
    start = time.monotonic()
    process.start()
    send.close()
    try:
        row = (
            receive.recv()
            if receive.poll(40 * seconds)
            else {"outcome": "timeout", "error": "waited too long"}
        )
    except EOFError:
        process.join()
        is_limit = process.exitcode == -signal.SIGXCPU
        row = {"outcome": "timeout" if is_limit else "crash", "error": f"exit code {process.exitcode}"}
    process.kill()
    process.join()
    return row | {"wall_s": time.monotonic() - start}


def store(path: Path, head: dict[str, Any], tool: str, name: str, row: dict[str, Any]) -> None:
    """Put a row into the results, which other processes may be writing too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        record = load(path)
        record["tools"].setdefault(tool, {"command": head["command"], "rows": {}})["rows"][name] = rounded(
            row
        )
        record |= {key: head[key] for key in ("date", "seed", "versions", "machine")}
        path.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".new").replace(path)
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"tools": {}}


def may_help(path: Path, name: str) -> bool:
    """Whether hints are worth a try: where Torch-Pruning alone has neither succeeded nor run out of time."""
    plain = load(path)["tools"].get("torch-pruning", {"rows": {}})["rows"].get(name, {"outcome": ""})
    return plain["outcome"] not in ("equal", "timeout")


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return value


def wanted(patterns: Iterable[str], num: int | None) -> list[str]:
    """Return the models whose names contain one of `patterns`."""
    names = [name for name in zoo.names() if any(pattern in name for pattern in patterns)]
    if not names:
        raise SystemExit(f"No model has one of {', '.join(patterns)} in its name.")
    return names[:num]


def summary(record: dict[str, Any], names: list[str]) -> str:
    """Return how many models came to which end, a row for each tool and source; and what the proofs are worth."""
    found = {
        tool: {name: ran["rows"][name] for name in names if name in ran["rows"]}
        for tool, ran in record["tools"].items()
    }
    if "torch-pruning-hints" in found:
        plain, hinted = found["torch-pruning"], found.pop("torch-pruning-hints")
        best = {name: row for name, row in hinted.items() if row["outcome"] == "equal"}
        found["torch-pruning, head counts given where that helps"] = plain | best
    lines = []
    for tool, rows in found.items():
        for source in [*dict.fromkeys(name.partition("/")[0] for name in rows), "all"]:
            chosen = [r for name, r in rows.items() if source in ("all", name.partition("/")[0])]
            counts = Counter(row["outcome"] for row in chosen)
            cells = {outcome: str(counts[outcome] or "–") for outcome in OUTCOMES}
            lines.append({"tool": tool, "source": source, "models": str(len(chosen))} | cells)
    return table(lines) + "\n\n" + table([evidence(tool, rows) for tool, rows in found.items()])


def evidence(tool: str, rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return how equal the equal ones are, what wrong slices would make of them, what is left, and what it took."""
    equal = [row for row in rows.values() if row["outcome"] == "equal"]
    seconds = [sum(row.get(key, 0.0) for key in ("trace_s", "plan_s", "surgery_s")) for row in equal]
    visible = [min(row["controls"].values()) for row in equal if row.get("controls")]
    return {
        "tool": tool,
        "equal": str(len(equal)),
        "largest error": f"{max((row['relative_error'] for row in equal), default=0):.1e}",
        "least visible control": f"{min(visible, default=0):.1e}",
        f"controls below {VISIBLE:.0e}": str(sum(v < VISIBLE for v in visible) + len(equal) - len(visible)),
        "attention's scale changed": str(sum(row.get("scale") == "live" for row in equal)),
        "parameters kept, median": f"{median([row['params'] for row in equal] or [1]):.3f}",
        "CPU s, median": f"{median(seconds or [0]):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["ours"])
    parser.add_argument("--models", nargs="+", default=[""], help="parts of the names of models")
    parser.add_argument("--limit", type=int, help="number of models")
    parser.add_argument("--seconds", type=int, default=90, help="CPU time that a tool may take for a model")
    parser.add_argument("--redo", nargs="*", help="outcomes to run again; without any, all")
    parser.add_argument("--out", type=Path, default=RESULTS / "structured_coverage.json")
    parser.add_argument("--show", action="store_true", help="only print what the results file holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = wanted(options.models, options.limit)
    if options.show:
        print(summary(load(options.out), names))
        return
    zoo.load()
    head = facts(0)
    for name in names:
        for tool in options.tools:
            before = load(options.out)["tools"].get(tool, {"rows": {}})["rows"].get(name)
            if before and (options.redo is None or (options.redo and before["outcome"] not in options.redo)):
                continue
            if tool == "torch-pruning-hints" and not may_help(options.out, name):
                continue
            row = in_own_process(tool, name, options.seconds) | {"revision": revision()}
            store(options.out, head, tool, name, row)
            print(f"{tool:20} {name:45} {line(row)}", flush=True)
    print(summary(load(options.out), names))


def line(row: dict[str, Any]) -> str:
    seconds = [f"{row[key]:.1f}" for key in ("trace_s", "plan_s", "surgery_s") if key in row]
    control = f"control {min(row['controls'].values()):.0e}" if row.get("controls") else ""
    error = f"{row['relative_error']:.0e}" if "relative_error" in row else row.get("error", "")[:150]
    found = f"{row['outcome']:15} {row.get('params', 1):.3f} {error} {control}"
    return f"{found} {'+'.join(seconds)} s, late {len(row.get('late', ()))}"


if __name__ == "__main__":
    main()
