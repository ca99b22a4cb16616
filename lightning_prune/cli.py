"""What `train.py` and the other commands do with their configuration: check it, then run and report.

The nouns of a recipe are built first, which checks their ranges without torch: a mistake is answered at once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.answers import answer
from lightning_prune.config import PRUNING
from lightning_prune.core.checks import check_choice, check_count, check_positive
from lightning_prune.core.criteria import check_can_calibrate, check_can_train
from lightning_prune.core.masking import checked_masking
from lightning_prune.core.ramp import check_timing
from lightning_prune.core.recipe import checked_rounds, checked_shrink, checked_solver
from lightning_prune.core.regularizers import checked_regularizer
from lightning_prune.examples.settings import Loading, Optimization
from lightning_prune.model.export.formats import FORMATS, check_installed, checked_filename
from lightning_prune.report.invocation import Invocation, invoked, redacted
from lightning_prune.report.storage import write_text
from lightning_prune.sweep.notes import METRICS_FILE, finished
from lightning_prune.sweep.processes import as_a_run_of_its_own

if TYPE_CHECKING:
    import lightning as L

    from lightning_prune.report.data import Cost
    from lightning_prune.report.preview import Preview

Metrics: TypeAlias = dict[str, float]
PLAN_FILE = "plan.json"
NAMED_CHECKPOINTS = ("best", "last", "hpc")
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
FULL_ERROR = "HYDRA_FULL_ERROR"
OURS = ("joblib", "submitit_local", "submitit_slurm", "optuna")
SIZES_OF_COST = ("params", "nonzeros", "macs", "effective_macs", "num_bytes", "gzip_bytes")


class SettingsError(CompactHydraException, ValueError):
    """Settings that are no good, found before anything is run; Hydra shows the message without a traceback."""


def run(main: Callable[[], object]) -> None:
    """Call a Hydra application, and answer a misspelt setting with its neighbours.

    Args:
        main: decorated with `hydra.main`.
    """
    _let_the_folder_decide()
    if FULL_ERROR in os.environ:
        main()
        return
    os.environ[FULL_ERROR] = "1"  # Hydra raises what it would print
    try:
        main()
    except Exception as error:
        if (said := answer(error)) is None:
            raise
        sys.stderr.write(f"{said}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    finally:
        del os.environ[FULL_ERROR]


def train(cfg: DictConfig) -> float | tuple[float, ...] | Metrics:
    """Train and prune a model, or prune a trained one, then test it.

    Args:
        cfg: as composed from `conf/train.yaml`.

    Returns:
        All metrics, or those that `optimized_metric` names, for a sweeper.

    Raises:
        ValueError: settings that are no good.
    """
    check(cfg)
    if cfg.resume and (known := _known_metrics()):
        _show(known, "metrics, as they are known already")
        return chosen(known, cfg.optimized_metric)
    with as_a_run_of_its_own():
        return chosen(_train(cfg), cfg.optimized_metric)


def _train(cfg: DictConfig) -> Metrics:
    import lightning as L

    from lightning_prune.rehearsal import rehearse

    _silence()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule, model = instantiate(cfg.data), instantiate(cfg.model)
    _check_optimized(cfg.optimized_metric, rehearse(model, datamodule))
    trainer = _trainer(cfg)
    with invoked(invocation_of(cfg)):
        if cfg.train:
            last = _last_checkpoint(cfg)
            if last is not None:
                _let_it_end(trainer)
            trainer.fit(model, datamodule=datamodule, ckpt_path=last or cfg.ckpt_path, weights_only=True)
        else:
            _pruning_callback(trainer).run(trainer, model, datamodule, cfg.ckpt_path)
    metrics = as_numbers(trainer.callback_metrics) | _reported(trainer) | _levels(trainer)
    if cfg.test:
        trainer.test(model, datamodule=datamodule, verbose=False)
        metrics |= as_numbers(trainer.callback_metrics)
    if trainer.is_global_zero:
        _write(metrics)
    return metrics


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
    import lightning as L

    from lightning_prune.callbacks.base import PruningCallback
    from lightning_prune.callbacks.preview import preview
    from lightning_prune.model.whole import read_checkpoint
    from lightning_prune.report.preview import to_json

    _silence()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule, model = instantiate(cfg.data), instantiate(cfg.model)
    is_trained = not cfg.train
    if is_trained:
        _load_weights(model, read_checkpoint(cfg.ckpt_path), cfg.ckpt_path)
    with open_dict(cfg):
        cfg.logger = None
    trainer = _trainer(cfg)
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
    import lightning as L

    from lightning_prune.model.targets import select_targets
    from lightning_prune.model.whole import read_checkpoint

    _silence()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule, model = instantiate(cfg.data), instantiate(cfg.model)
    _load_weights(model, read_checkpoint(cfg.ckpt_path), cfg.ckpt_path)
    trainer = _trainer(cfg)
    trainer.test(model, datamodule=datamodule, verbose=False)
    targets = select_targets(model)
    nonzeros = {name: int(parameter.count_nonzero()) for name, parameter in targets.items()}
    sizes = {name: parameter.numel() for name, parameter in targets.items()}
    metrics = as_numbers(trainer.callback_metrics)
    metrics["sparsity"] = 1.0 - sum(nonzeros.values()) / sum(sizes.values())
    if trainer.is_global_zero:
        _show({name: 1.0 - nonzeros[name] / sizes[name] for name in sizes}, "sparsity of weights")
        _write(metrics)
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
    import lightning as L

    from lightning_prune import analysis
    from lightning_prune.model.whole import read_checkpoint

    _silence()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule, model = instantiate(cfg.data), instantiate(cfg.model)
    _load_weights(model, read_checkpoint(cfg.ckpt_path), cfg.ckpt_path)
    folder = Path(HydraConfig.get().runtime.output_dir)
    names = ("metric", "sparsities", "sparsity", "include", "exclude", "curves")
    settings = {name: _plain(cfg[name]) for name in names}
    try:
        return analysis.analyse(_trainer(cfg), model, datamodule, folder, **settings)
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
    settings = _checked_export(cfg)
    import lightning as L

    from lightning_prune import shipping
    from lightning_prune.model.whole import read_checkpoint

    _silence()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule, model = instantiate(cfg.data), instantiate(cfg.model)
    _load_weights(model, read_checkpoint(cfg.ckpt_path), cfg.ckpt_path)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        found = shipping.ship(model, datamodule, folder, **settings)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    sys.stdout.write(f"run folder: {folder}\n")
    difference = {} if found.error is None else {"error": found.error}
    return {"num_bytes": float(found.num_bytes), **difference}


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


def chosen(metrics: Metrics, names: str | Iterable[str] | None) -> float | tuple[float, ...] | Metrics:
    """Pick what a sweep optimizes: one number, several, or with no name given all of them.

    Example:
        >>> chosen({"val/acc": 0.9, "sparsity": 0.5}, ["val/acc", "sparsity"])
        (0.9, 0.5)
    """
    if names is None:
        return metrics
    single = isinstance(names, str)
    values = tuple(
        metrics[check_choice("optimized_metric", n, metrics)] for n in ([names] if single else names)
    )
    return values[0] if single else values


def _check_optimized(names: str | Iterable[str] | None, logged: set[str] | None) -> None:
    """Refuse before the run what could not be picked after it, as far as it is known what a module logs."""
    for name in ([names] if isinstance(names, str) else names) or ():
        if logged and name.startswith(("train/", "val/", "test/")):
            check_choice("optimized_metric", name, sorted(logged))


def invocation_of(cfg: DictConfig) -> Invocation:
    """Return how the run was started, for its report: interpolations as they are written, secrets hidden."""
    config = OmegaConf.to_yaml(OmegaConf.create(redacted(OmegaConf.to_container(cfg, resolve=False))))
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return Invocation(("python", sys.argv[0]), tuple(overrides), config)


def _let_the_folder_decide() -> None:
    """Let `conf/hydra` say what joblib, submitit and optuna mean here, not the plugins of the same names.

    Hydra would take the plugins' settings as the schema of ours.
    """
    Plugins.instance()  # they have registered theirs when it is there
    for group in ("launcher", "sweeper"):
        registered = ConfigStore.instance().repo.get("hydra", {}).get(group, {})
        for name in OURS:
            registered.pop(f"{name}.yaml", None)


def as_numbers(metrics: Mapping[str, Any]) -> Metrics:
    """Return logged scalars as plain numbers."""
    return {name: float(value) for name, value in metrics.items()}


def _silence() -> None:
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


def _trainer(cfg: DictConfig) -> L.Trainer:
    callbacks, loggers = (_instantiate_all(cfg.get(group)) for group in ("callbacks", "logger"))
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False)
    return trainer


def _load_weights(model: L.LightningModule, checkpoint: Mapping[str, Any], path: str) -> None:
    from lightning_prune.model.record import shrink_to_

    try:
        shrink_to_(model, checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, ValueError) as error:
        raise SettingsError(
            f"`model` is the one that was saved in {path}, but got another: {error}"
        ) from None


def _instantiate_all(group: DictConfig | None) -> list[Any]:
    return [instantiate(node) for node in (group or {}).values() if node and "_target_" in node]


def _known_metrics() -> Metrics | None:
    """What the run folder holds of a run that has ended."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    try:
        return finished(Path(hydra.runtime.output_dir), list(hydra.overrides.task))
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _last_checkpoint(cfg: DictConfig) -> str | None:
    """Where a run that is to go on has got to, if it has got anywhere."""
    checkpoint = cfg.get("callbacks", {}).get("checkpoint") or {}
    path = Path(checkpoint.get("dirpath") or "") / f"{checkpoint.get('filename') or 'last'}.ckpt"
    return str(path) if cfg.resume and path.is_file() else None


def _let_it_end(trainer: L.Trainer) -> None:
    """Let a run that was stopped after its last epoch do what is left: prune, take out, report.

    Lightning's loop is skipped as a whole where no epoch is left to be trained, the hooks at its end with it.
    """
    loop = type(trainer.fit_loop)
    trainer.fit_loop.__class__ = type(loop.__name__, (loop,), {"skip": property(lambda loop: False)})


def _pruning_callback(trainer: L.Trainer) -> Any:
    from lightning_prune import PostTrainingPruning

    return next(cb for cb in trainer.callbacks if isinstance(cb, PostTrainingPruning))  # type: ignore[attr-defined]


def _reported(trainer: L.Trainer) -> Metrics:
    """What the report knows of the run: the metrics of the pruned model and its size."""
    from lightning_prune import SparsityMonitor

    monitors = [cb for cb in trainer.callbacks if isinstance(cb, SparsityMonitor)]  # type: ignore[attr-defined]
    report = monitors[0].report if monitors else None
    if report is None:
        return {}
    known = {"sparsity": report.achieved_sparsity or 0.0, **_sizes(report.cost_after), **report.metrics_after}
    known |= {f"dense/{name}": value for name, value in _sizes(report.cost_before).items()}
    if report.kind == "post_training":  # elsewhere the dense model was still in training
        known |= {f"dense/{name}": value for name, value in report.metrics_before.items()}
    return {name: float(value) for name, value in known.items() if value is not None}


def _sizes(cost: Cost | None) -> dict[str, float | None]:
    """What a model costs, as far as it was measured; of its latency the median and the quartiles."""
    if cost is None:
        return {}
    sizes = {name: getattr(cost, name) for name in SIZES_OF_COST}
    if (latency := cost.latency) is not None:
        sizes |= {"latency_ms": latency.median_ms}
        sizes |= {"latency_low_ms": latency.low_ms, "latency_high_ms": latency.high_ms}
    return sizes


def _levels(trainer: L.Trainer) -> Metrics:
    """What each level of a run that rewinds has come to: "level2/val/acc"."""
    from lightning_prune import WeightRewinding

    callbacks = [cb for cb in trainer.callbacks if isinstance(cb, WeightRewinding)]  # type: ignore[attr-defined]
    levels = [found for callback in callbacks for found in callback.levels]
    return {f"level{f['level']:.0f}/{name}": v for f in levels for name, v in f.items() if name != "level"}


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
        checked_solver(values["solver"], values["granularity"], values["blocks"])


def _built(node: Any) -> Any:
    """Return a setting as it is, or what it describes."""
    return instantiate(node) if OmegaConf.is_dict(node) and "_target_" in node else _plain(node)


def _checked_export(cfg: DictConfig) -> dict[str, Any]:
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


def _check_checkpoint(cfg: DictConfig) -> None:
    path = cfg.ckpt_path
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


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _show_plans(previews: Sequence[Preview], *, as_json: bool) -> None:
    from lightning_prune.report.preview import page, to_json
    from lightning_prune.report.render import page_to_rich

    if as_json:
        sys.stdout.write("".join(map(to_json, previews)))
        return
    from rich.console import Console

    for found in previews:
        Console().print(page_to_rich(page(found)))


def _write(metrics: Metrics) -> None:
    """Write the metrics into Hydra's run folder, where a sweep finds them, and show them."""
    _show(metrics, "metrics")
    if HydraConfig.initialized():
        folder = Path(HydraConfig.get().runtime.output_dir)
        write_text(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
        sys.stdout.write(f"run folder: {folder}\n")


def _show(numbers: Mapping[str, float], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title, "")
    for name, value in sorted(numbers.items()):
        table.add_row(name, f"{value:.4f}" if value % 1 else f"{value:.0f}")
    Console().print(table)
