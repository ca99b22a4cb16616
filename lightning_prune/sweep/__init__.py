"""One sweep, many jobs: what came of them, which one to take, and how to finish the rest.

`python -m lightning_prune.sweep multirun/...` reports on a folder at any time; `SweepReport` does so when a sweep ends.
The functions return plain rows (dicts), ready for `pandas.DataFrame(rows)`.
"""

from lightning_prune.sweep.callback import SweepReport
from lightning_prune.sweep.choice import Recommendation, pareto_front, recommend
from lightning_prune.sweep.rows import Row, group_rows, is_lower_better, read_jobs, sorted_rows
from lightning_prune.sweep.summary import Summary, report, summarise

__all__ = [
    "Recommendation",
    "Row",
    "Summary",
    "SweepReport",
    "group_rows",
    "is_lower_better",
    "pareto_front",
    "read_jobs",
    "recommend",
    "report",
    "sorted_rows",
    "summarise",
]
