"""`python -m lightning_prune.sweep FOLDER`: report on a sweep, finished or not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_prune.core.directions import MODES
from lightning_prune.sweep.choice import TOLERANCE
from lightning_prune.sweep.rows import SEEDS
from lightning_prune.sweep.summary import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on a sweep's folder: sweep.csv, sweep.png, sweep.html, what to take, and how to finish the rest."""
    parser = argparse.ArgumentParser(prog="python -m lightning_prune.sweep", description=main.__doc__)
    parser.add_argument("folder", help="of a Hydra multirun, e.g. multirun/2026-01-31/12-00-00")
    parser.add_argument("--sort-by", help="a column, best first; by default the metric")
    parser.add_argument("--metric", help="the column of quality to choose by, e.g. val/acc")
    parser.add_argument("--mode", choices=MODES, help="what is better of it, where its name does not tell")
    parser.add_argument("--size", help="the column of size to choose by, e.g. nonzeros, macs, latency_ms")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="what the recommended model may lose against the dense one: in units of an accuracy, as a fraction of "
        "a loss or perplexity (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        default=list(SEEDS),
        help="overrides that are repetitions (default: %(default)s)",
    )
    options = vars(parser.parse_args(arguments))
    try:
        report(**options)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
