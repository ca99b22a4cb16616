"""`eval.py`, `sensitivity.py` and `export.py`: what is done with a model that is trained."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_prune.cli.checks import check, checked_export, plain
from lightning_prune.cli.errors import SettingsError
from lightning_prune.cli.outcome import Metrics, as_numbers, show, write
from lightning_prune.cli.parts import loaded, trainer_of


def evaluate(cfg: DictConfig) -> Metrics:
    """Test a checkpoint, pruned or not, and count its zeros.

    Args:
        cfg: as composed from `conf/eval.yaml`.

    Returns:
        The test metrics, and `sparsity`: the fraction of zeros among the weights that are pruned by default.

    Raises:
        ValueError: settings that are no good, or a checkpoint of another model.
    """
    check(cfg)
    from lightning_prune.model.targets import select_targets

    datamodule, model = loaded(cfg)
    trainer = trainer_of(cfg)
    trainer.test(model, datamodule=datamodule, verbose=False)
    targets = select_targets(model)
    nonzeros = {name: int(parameter.count_nonzero()) for name, parameter in targets.items()}
    sizes = {name: parameter.numel() for name, parameter in targets.items()}
    metrics = as_numbers(trainer.callback_metrics)
    metrics["sparsity"] = 1.0 - sum(nonzeros.values()) / sum(sizes.values())
    if trainer.is_global_zero:
        show({name: 1.0 - nonzeros[name] / sizes[name] for name in sizes}, "sparsity of weights")
        write(metrics)
    return metrics


def analyse(cfg: DictConfig) -> Metrics:
    """Prune one layer of a trained model at a time and validate it, and allocate a sparsity over the layers.

    Args:
        cfg: as composed from `conf/sensitivity.yaml`.

    Returns:
        The sparsities by layer.

    Raises:
        ValueError: settings that are no good, or a checkpoint of another model.
    """
    check(cfg)
    from lightning_prune.cli import analysis

    datamodule, model = loaded(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    names = ("metric", "mode", "sparsities", "sparsity", "include", "exclude", "curves")
    settings = {name: plain(cfg[name]) for name in names}
    try:
        return analysis.analyse(trainer_of(cfg), model, datamodule, folder, **settings)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def export(cfg: DictConfig) -> Metrics:
    """Write a checkpoint's model into a file that other programs read.

    Args:
        cfg: as composed from `conf/export.yaml`.

    Returns:
        The size of the file, and where it holds a program, how far its outputs differ.

    Raises:
        ValueError: settings that are no good, a checkpoint of another model, or a file that computes something else.
    """
    check(cfg)
    settings = checked_export(cfg)
    from lightning_prune.cli import shipping

    datamodule, model = loaded(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        found = shipping.ship(model, datamodule, folder, **settings)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    sys.stdout.write(f"run folder: {folder}\n")
    difference = {} if found.error is None else {"error": found.error}
    return {"num_bytes": float(found.num_bytes), **difference}
