"""`train.py`: train and prune, or prune what is trained; and go on with a run that was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_prune.cli.checks import check
from lightning_prune.cli.errors import SettingsError
from lightning_prune.cli.outcome import (
    Metrics,
    as_numbers,
    check_can_choose,
    chosen,
    levels_of,
    reported,
    show,
    write,
)
from lightning_prune.cli.parts import invocation_of, made, trainer_of
from lightning_prune.report.invocation import invoked
from lightning_prune.sweep.notes import finished
from lightning_prune.sweep.processes import as_a_run_of_its_own

if TYPE_CHECKING:
    import lightning as L


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
        show(known, "metrics, as they are known already")
        return chosen(known, cfg.optimized_metric)
    with as_a_run_of_its_own():
        return chosen(_train(cfg), cfg.optimized_metric)


def _train(cfg: DictConfig) -> Metrics:
    from lightning_prune.cli.rehearsal import rehearse

    datamodule, model = made(cfg)
    check_can_choose(cfg.optimized_metric, _logged(cfg, rehearse(model, datamodule)))
    trainer = trainer_of(cfg)
    with invoked(invocation_of(cfg)):
        if cfg.train:
            last = _last_checkpoint(cfg)
            if last is not None:
                _let_it_end(trainer)
            with _of_this_model(last or cfg.ckpt_path):
                trainer.fit(model, datamodule=datamodule, ckpt_path=last or cfg.ckpt_path, weights_only=True)
        else:
            with _of_this_model(cfg.ckpt_path):
                _pruning_callback(trainer).run(trainer, model, datamodule, cfg.ckpt_path)
    metrics = as_numbers(trainer.callback_metrics) | reported(trainer) | levels_of(trainer)
    if cfg.test:
        trainer.test(model, datamodule=datamodule, verbose=False)
        metrics |= as_numbers(trainer.callback_metrics)
    if trainer.is_global_zero:
        write(metrics)
    return metrics


def _logged(cfg: DictConfig, names: set[str] | None) -> set[str] | None:
    """Return the metrics that a run logs, of those that its steps would: it may leave out some of the stages."""
    limits = {stage: (cfg.get("trainer") or {}).get(f"limit_{stage}_batches") for stage in ("val", "test")}
    runs = {"train": cfg.train, "val": limits["val"] != 0, "test": cfg.test and limits["test"] != 0}
    skipped = tuple(f"{stage}/" for stage, does_run in runs.items() if not does_run)
    return names and {name for name in names if not name.startswith(skipped)}


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


@contextmanager
def _of_this_model(path: str | None) -> Iterator[None]:
    """Say which setting is to blame where torch finds that a checkpoint's tensors are not those of the model."""
    try:
        yield
    except RuntimeError as error:
        if path is None or not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise SettingsError(
            f"`model` is the one that was saved in `ckpt_path`, {path}, but got another: {error}"
        ) from error


def _pruning_callback(trainer: L.Trainer) -> Any:
    from lightning_prune import PostTrainingPruning

    return next(cb for cb in trainer.callbacks if isinstance(cb, PostTrainingPruning))  # type: ignore[attr-defined]
