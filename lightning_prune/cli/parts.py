"""What the commands are made of: the trainer, the model and its weights, and a quiet log."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_prune.cli.errors import SettingsError
from lightning_prune.report.invocation import Invocation, redacted

if TYPE_CHECKING:
    import lightning as L

PLAIN = (bool, int, float, str)


def made(cfg: DictConfig) -> tuple[L.LightningDataModule, L.LightningModule]:
    """Return the data and the model, fresh, everything that is drawn being drawn from the seed."""
    import lightning

    silence()
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    return instantiate(cfg.data), instantiate(cfg.model)


def loaded(cfg: DictConfig) -> tuple[L.LightningDataModule, L.LightningModule]:
    """Return the data, and the model as the checkpoint has it.

    Raises:
        SettingsError: the checkpoint is of another model.
    """
    from lightning_prune.model.whole import read_checkpoint

    datamodule, model = made(cfg)
    load_weights_(model, read_checkpoint(cfg.ckpt_path), cfg.ckpt_path)
    return datamodule, model


def trainer_of(cfg: DictConfig) -> L.Trainer:
    """Return the trainer, with its callbacks and loggers.

    Raises:
        SettingsError: a setting of the Trainer is of a kind that it does not take.
    """
    import lightning

    check_kinds(cfg.trainer, get_type_hints(lightning.Trainer.__init__))
    callbacks, loggers = (_instantiate_all(cfg.get(group)) for group in ("callbacks", "logger"))
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False)
    return trainer


def check_kinds(settings: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse what is no number, text or flag where only such is taken; Lightning fails on it later, in its own ways.

    Args:
        settings: by name; None is always let through.
        hints: what an argument may be; those that may be anything else but numbers, text and flags are let through.

    Raises:
        SettingsError: a value of another kind.

    Example:
        >>> check_kinds({"max_epochs": 3, "min_epochs": None}, {"max_epochs": int, "min_epochs": int | None})
        >>> check_kinds({"max_epochs": [3]}, {"max_epochs": int | None})
        Traceback (most recent call last):
        lightning_prune.cli.errors.SettingsError: `trainer.max_epochs` is of type int, but got [3].
    """
    for name, value in settings.items():
        kinds = [kind for kind in (get_args(hints.get(name)) or (hints.get(name),)) if kind is not NoneType]
        if value is None or not all(kind in PLAIN for kind in kinds):
            continue
        if not isinstance(value, tuple(kinds)):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise SettingsError(f"`trainer.{name}` is of type {names}, but got {value!r}.")


def load_weights_(model: L.LightningModule, checkpoint: Mapping[str, Any], path: str) -> None:
    """Make a model what a checkpoint holds, as small as that is.

    Raises:
        SettingsError: the checkpoint is of another model.
    """
    from lightning_prune.model.record import shrink_to_

    try:
        shrink_to_(model, checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, ValueError) as error:
        raise SettingsError(
            f"`model` is the one that was saved in {path}, but got another: {error}"
        ) from None


def invocation_of(cfg: DictConfig) -> Invocation:
    """Return how the run was started, for its report: interpolations as they are written, secrets hidden."""
    config = OmegaConf.to_yaml(OmegaConf.create(redacted(OmegaConf.to_container(cfg, resolve=False))))
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return Invocation(("python", sys.argv[0]), tuple(overrides), config)


def _instantiate_all(group: DictConfig | None) -> list[Any]:
    return [instantiate(node) for node in (group or {}).values() if node and "_target_" in node]


def silence() -> None:
    """Keep from the user what tells of nothing to be done, and each line of the log from coming twice."""
    warnings.filterwarnings(
        "ignore", ".isinstance.treespec, LeafSpec.. is deprecated", FutureWarning
    )  # lightning 2.6
    warnings.filterwarnings(
        "ignore", "The '.*_dataloader' does not have many workers"
    )  # data in memory needs none
    warnings.filterwarnings("ignore", "Total length of .list. across ranks is zero")  # data.num_val=0
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()  # Hydra shows and keeps the log
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
