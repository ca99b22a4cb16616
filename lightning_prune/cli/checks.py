"""What can be refused without torch: the nouns of a recipe are built, which checks their ranges at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.cli.errors import SettingsError
from lightning_prune.config import PRUNING
from lightning_prune.core.checks import check_choice, check_count, check_path, check_positive
from lightning_prune.core.criteria import check_can_calibrate, check_can_train
from lightning_prune.core.masking import checked_masking
from lightning_prune.core.ramp import check_timing
from lightning_prune.core.recipe import checked_rounds, checked_shrink, checked_solver
from lightning_prune.core.regularizers import checked_regularizer
from lightning_prune.examples.settings import Loading, Optimization
from lightning_prune.model.export.formats import FORMATS, check_installed, checked_filename

NAMED_CHECKPOINTS = ("last", "hpc")
TRAINER_COUNTS = {"max_epochs": -1, "accumulate_grad_batches": 1, "log_every_n_steps": 0}
"""Whole numbers of the Trainer that it does not check itself, and their minimum."""
TRAINER_FLAGS = (
    "detect_anomaly",
    "barebones",
    "inference_mode",
    "enable_progress_bar",
    "enable_checkpointing",
)
"""What is true or false, and not checked by the Trainer either."""


def check(cfg: DictConfig) -> None:
    """Refuse what can be refused without torch.

    Raises:
        SettingsError: a value out of its range, settings that contradict each other, or a missing checkpoint.
    """
    try:
        check_count("seed", cfg.seed, minimum=0)
        for name, minimum in TRAINER_COUNTS.items():
            if (value := (cfg.get("trainer") or {}).get(name)) is not None:
                check_count(f"trainer.{name}", value, minimum)
        for name in TRAINER_FLAGS:
            if not isinstance(value := (cfg.get("trainer") or {}).get(name), bool | None):
                raise ValueError(f"`trainer.{name}` is true or false, but got {value!r}.")
        for group, settings in (("data", Loading), ("model", Optimization)):
            _check_example(cfg[group], settings)
        pruning = cfg.get("pruning") or {}
        if pruning.get("_target_") in {target for _, target, _ in PRUNING.values()}:
            _check_recipe(pruning)
        _check_checkpoint(cfg)
        if not cfg.get("train", True):
            _check_without_training(cfg, pruning.get("_target_"))
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise SettingsError(f"{str(error).rpartition('full_key: ')[2]}: {cause}") from cause
    except (ValueError, OmegaConfBaseException) as error:
        raise SettingsError(str(error)) from error


def checked_export(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of an export, checked without torch."""
    try:
        format = check_choice("format", cfg.format, FORMATS)
        check_installed(format)
        for name in ("dynamic_batch", "latency"):
            if not isinstance(cfg[name], bool):
                raise ValueError(f"`{name}` is true or false, but got {cfg[name]!r}.")
        return {
            "format": format,
            "filename": checked_filename(cfg.filename, format),
            "tolerance": check_positive("tolerance", cfg.tolerance),
            "dynamic_batch": cfg.dynamic_batch,
            "latency": cfg.latency,
        }
    except (ImportError, ValueError) as error:
        raise SettingsError(str(error)) from error


def plain(value: Any) -> Any:
    """Return a setting as plain lists and dicts, if it is a group of them."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _check_example(node: DictConfig, settings: type[Loading] | type[Optimization]) -> None:
    """Check the settings of an example as it will itself; those of a foreign class are its own."""
    if str(node.get("_target_")).startswith("lightning_prune.examples."):
        names = [f.name for f in dataclasses.fields(settings) if f.name in node]
        settings(**{name: node[name] for name in names})


def _check_recipe(pruning: Mapping[str, Any]) -> None:
    kind, recipe = next(
        (n, made) for n, (made, target, _) in PRUNING.items() if target == pruning["_target_"]
    )
    values = {name: _built(pruning[name]) for name in pruning if not name.startswith("_")}
    recipe(**{f.name: values[f.name] for f in dataclasses.fields(recipe)})
    if "num_calibration_batches" in values:
        check_count("num_calibration_batches", values["num_calibration_batches"], minimum=1)
    if "num_rounds" in values:
        checked_rounds(values["num_rounds"], values.get("revive", False), values["budget"])
    if "window" in values:
        check_timing(values["schedule"], values["window"])
    if kind == "train_time":
        check_can_train(values["criterion"])
        checked_shrink(values["shrink"], values["granularity"])
        checked_masking(values["masking"], values["granularity"])
        checked_regularizer(values["regularizer"], values["granularity"])
    elif kind == "initial":
        check_can_calibrate(values["criterion"])
        checked_shrink(values["shrink"], values["granularity"], choices=("end", "never"))
    elif kind == "post_training":
        check_can_calibrate(values["criterion"])
        check_choice("checkpoint", values["checkpoint"], ("last", "best"))
        checked_solver(values["solver"], values["granularity"], values["blocks"], values["num_rounds"])


def _built(node: Any) -> Any:
    """Return a setting as it is, or what it describes."""
    return instantiate(node) if OmegaConf.is_dict(node) and "_target_" in node else plain(node)


def _check_checkpoint(cfg: DictConfig) -> None:
    path = cfg.ckpt_path
    if path is not None:
        check_path("ckpt_path", path)
    if path is not None and path not in NAMED_CHECKPOINTS and "://" not in path and not Path(path).is_file():
        raise ValueError(f"`ckpt_path` is a checkpoint file, but got {path!r}, which is not there.")


def _check_without_training(cfg: DictConfig, target: str | None) -> None:
    if target != PRUNING["post_training"][1]:
        raise ValueError(
            "`train` is false only for recipes that prune after training, as pruning=one_shot, but got "
            f"{target or 'no pruning'}."
        )
    if cfg.ckpt_path is None:
        raise ValueError("`ckpt_path` is the trained model to prune where train=false, but got None.")
