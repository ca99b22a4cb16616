"""What `train.py` and the other commands do with their configuration: check it, then run and report."""

from lightning_prune.cli.checks import check
from lightning_prune.cli.errors import SettingsError, run
from lightning_prune.cli.outcome import Metrics, as_numbers, chosen
from lightning_prune.cli.planning import plan
from lightning_prune.cli.trained import analyse, evaluate, export
from lightning_prune.cli.training import train

__all__ = [
    "Metrics",
    "SettingsError",
    "analyse",
    "as_numbers",
    "check",
    "chosen",
    "evaluate",
    "export",
    "plan",
    "run",
    "train",
]
