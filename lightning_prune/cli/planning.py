"""`plan.py`: what a run would do, without training."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from lightning_prune.cli.checks import check
from lightning_prune.cli.parts import loaded, made, trainer_of

if TYPE_CHECKING:
    import lightning as L

    from lightning_prune.report.preview import Preview

PLAN_FILE = "plan.json"


def plan(cfg: DictConfig) -> bool:
    """Tell what `train` would do with the same configuration, without training.

    It is printed, and written into the run's folder as `plan.json`. The process ends with 1 where something stands
    against the run.

    Args:
        cfg: as composed from `conf/plan.yaml`.

    Returns:
        True: nothing stands against it.

    Raises:
        ValueError: settings that are no good.
        SystemExit: with code 1, the model or the trainer is in the way.
    """
    check(cfg)
    from lightning_prune.callbacks.base import PruningCallback
    from lightning_prune.callbacks.preview import preview
    from lightning_prune.report.preview import to_json

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    is_trained = not cfg.train
    datamodule, model = loaded(cfg) if is_trained else made(cfg)
    with open_dict(cfg):
        cfg.logger = None
    trainer = trainer_of(cfg)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [cb for cb in callbacks if isinstance(cb, PruningCallback)]
    previews = [preview(cb, model, datamodule, trainer, is_trained=is_trained) for cb in found or (None,)]
    if HydraConfig.initialized():
        path = Path(HydraConfig.get().runtime.output_dir) / PLAN_FILE
        path.write_text("".join(map(to_json, previews)), encoding="utf-8")
    _show_plans(previews, as_json=cfg.json)
    if any(p.troubles or (cfg.strict and p.risks) for p in previews):
        sys.exit(1)
    return True


def _show_plans(previews: Sequence[Preview], *, as_json: bool) -> None:
    from lightning_prune.report.preview import to_json
    from lightning_prune.report.preview_rows import page
    from lightning_prune.report.render import page_to_rich

    if as_json:
        sys.stdout.write("".join(map(to_json, previews)))
        return
    from rich.console import Console

    for found in previews:
        Console().print(page_to_rich(page(found)))
