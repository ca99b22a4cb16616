"""One run of the accuracy benchmark: its setting, its configuration, and what comes of it."""

from __future__ import annotations

import contextlib
import gc
import io
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelPruning
from omegaconf import open_dict

from benchmarks.accuracy_others import OTHERS
from benchmarks.accuracy_tables import AT_RANDOM, GRADUAL, MODEL_PRUNING, is_more_better
from lightning_prune import cli

ROOT = Path(__file__).resolve().parents[1]
ON_ALL = ["data.num_val=0", "+trainer.limit_val_batches=0"]
ON_SOME = ["data.num_val=48000", ON_ALL[1]]
OF_GPT = "test/perplexity", ("network.embedding", "network.positions", "network.head")
SMALL_GPT = [
    *(
        "model=gpt",
        "model.num_layers=2",
        "model.width=64",
        "model.lr=3e-3",
        "data=tinyshakespeare",
        "data.block_size=64",
    ),
    *("+trainer.limit_test_batches=20", ON_ALL[1]),
]
RESNET8 = ["model=resnet20", "model.num_blocks=1", "data=fashion_mnist"]


@dataclass(frozen=True)
class Setting:
    """Data, network and epochs, as the command line would say them, and the metric by which methods are compared."""

    epochs: int
    words: Sequence[str]
    metric: str = "test/acc"
    exclude: Sequence[str] = ()


SETTINGS = {
    "mlp-mnist": Setting(10, ["model=lenet_300_100", "data=mnist", *ON_ALL]),
    "mlp-mnist-subset": Setting(10, ["model=lenet_300_100", "data=mnist", *ON_SOME]),
    "lenet5-mnist": Setting(4, ["model=lenet5", "data=mnist", *ON_ALL]),
    "lenet5-mnist-subset": Setting(4, ["model=lenet5", "data=mnist", *ON_SOME]),
    "mlp-fashion": Setting(10, ["model=lenet_300_100", "data=fashion_mnist", *ON_ALL]),
    "mlp-fashion-subset": Setting(10, ["model=lenet_300_100", "data=fashion_mnist", *ON_SOME]),
    "resnet8-fashion": Setting(6, [*RESNET8, *ON_ALL]),
    "resnet8-fashion-subset": Setting(4, [*RESNET8, *ON_SOME]),
    "gpt-shakespeare": Setting(10, ["model=gpt", "data=tinyshakespeare", ON_ALL[1]], *OF_GPT),
    "small-gpt-shakespeare": Setting(4, [*SMALL_GPT, "+trainer.limit_train_batches=150"], *OF_GPT),
    "small-gpt-shakespeare-long": Setting(12, SMALL_GPT, *OF_GPT),
}
"""Subsets are the first 12,000 images, for a CPU: seconds a run; the small GPT has 0.1 M parameters and 600 steps, or
5,892."""
SMALL = ("mlp-fashion-subset", "lenet5-mnist-subset", "resnet8-fashion-subset", "small-gpt-shakespeare")
TELLING = (GRADUAL, "one_shot", AT_RANDOM, "random", "rigl", "rigl_mean", "set", "static", MODEL_PRUNING)
"""What is worth running where time is short."""


class Run(NamedTuple):
    """One training."""

    setting: str
    method: str
    sparsity: float
    seed: int


SPARSITIES = (0.95, 0.9, 0.98, 0.8, 0.99)  # what tells most comes first
LEFT_OUT = {
    "none",
    "gradual",
    "rows",
    "global_structured",
    "local_structured",
    "reconstruct_channels",
    "network_slimming",
    "sparse_learning",
    "heads",
    "depth",
}
LEFT_OUT |= {"latency_budget"}
"""Recipes that remove more than single weights; `gradual` is what global_unstructured is."""
IN_TRAININGS = {
    "lottery_ticket": ["trainer.max_epochs={one}", "pruning.num_levels={levels}"],
    "rewinding": ["trainer.max_epochs={one}", "pruning.num_levels={short}"],
    "lr_rewinding": ["trainer.max_epochs={one}", "pruning.num_levels={levels}"],
}
"""What makes several trainings together as long as one of the others; those of `rewinding` are an epoch shorter."""


def methods() -> list[str]:
    """Return the recipes that take a sparsity and remove single weights, and the baselines."""
    found = []
    for path in sorted((ROOT / "conf" / "pruning").glob("*.yaml")):
        if path.stem not in LEFT_OUT:
            pruning = composed(Run("mlp-mnist", path.stem, 0.5, 0)).get("pruning")
            if pruning and pruning.get("sparsity") is not None:
                found.append(path.stem)
    return [*found, AT_RANDOM, MODEL_PRUNING]


def composed(
    run: Run, root: str = "", folder: str = ".", accelerator: str = "cpu", kept: Path | None = None
) -> Any:
    """Compose the configuration of a run; recipes that set their own sparsity leave it as it is.

    Args:
        run: what to train.
        root: folder of the data; by default the configuration's own.
        folder: where the run's files go.
        accelerator: `cpu` or `gpu`.
        kept: checkpoint of the dense network: a dense run writes it, a recipe that prunes after training reads it.
    """
    setting, method, sparsity, seed = run
    epochs, overrides = SETTINGS[setting].epochs, SETTINGS[setting].words
    recipe = {"dense": "none", MODEL_PRUNING: "none", AT_RANDOM: "one_shot"}.get(method, method)
    overrides = [*overrides, "pruning/criterion=random"] if method == AT_RANDOM else overrides
    chosen = OTHERS[method][1] if method in OTHERS else [f"pruning={recipe}"]
    words = [*overrides, *chosen, f"trainer.max_epochs={epochs}", f"seed={seed}"]
    one = max(2, epochs // 5)
    levels, short = (epochs - one) // one, (epochs - one) // (one - 1)
    words += [word.format(one=one, levels=levels, short=short) for word in IN_TRAININGS.get(method, ())]
    words += ["callbacks=none", "logger=none", "trainer.enable_progress_bar=false"]
    words += [f"trainer.accelerator={accelerator}", f"hydra.runtime.output_dir={folder}"]
    words += [f"data.root={root}"] if root else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", words, return_hydra_config=True)
    pruning = cfg.get("pruning") or {}
    with open_dict(cfg):
        if pruning.get("sparsity") is not None and method not in OTHERS:
            pruning.sparsity = sparsity
        if SETTINGS[setting].exclude and "exclude" in pruning and method != "depth":
            pruning.exclude = list(SETTINGS[setting].exclude)
        if "report" in pruning:
            pruning.report = False
        if method == MODEL_PRUNING:
            target = {
                "_target_": "benchmarks.accuracy_runs.model_pruning",
                "sparsity": sparsity,
                "epochs": epochs,
            }
            cfg.callbacks = {"pruning": target}
        if kept is not None and method == "dense":
            cfg.callbacks = {"checkpoint": checkpoint(kept)}
        elif kept is not None and is_after_training(cfg):
            cfg.train, cfg.ckpt_path = False, str(kept)
    return cfg


def checkpoint(path: Path) -> dict[str, Any]:
    """Return the callback that writes the weights of the last epoch to `path`."""
    return {
        "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
        "dirpath": str(path.parent),
        "filename": path.stem,
        "save_weights_only": True,
        "enable_version_counter": False,
    }


def is_after_training(cfg: Any) -> bool:
    """Whether a configuration's recipe prunes what is trained, so that one dense network serves them all."""
    return bool((cfg.get("pruning") or {}).get("_target_", "").endswith(".PostTrainingPruning"))


def model_pruning(sparsity: float, epochs: int) -> ModelPruning:
    """Return Lightning's callback with amounts that, compounded, follow a cubic ramp over 70 % of the epochs."""

    def reached(epoch: int) -> float:
        progress = min(1.0, (epoch + 1) / (0.7 * epochs))
        return sparsity * (1 - (1 - progress) ** 3)

    def amount(epoch: int) -> float:
        before = reached(epoch - 1) if epoch else 0.0
        return (reached(epoch) - before) / (1 - before)

    return ModelPruning(
        "l1_unstructured",
        parameter_names=["weight"],  # by default it prunes biases as well
        amount=amount,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
    )


def result(run: Run, root: str, accelerator: str = "cpu", trained: Path | None = None) -> dict[str, Any]:
    """Train once, or prune what is trained, and return the metric of the test, an accuracy in percent.

    Args:
        run: what to train.
        root: folder of the data.
        accelerator: `cpu` or `gpu`.
        trained: folder of the dense networks, for the methods that prune after training: their seconds are those of
            pruning and testing. Without it, each trains its own.
    """
    kept = trained / f"{run.setting}-{run.seed}.ckpt" if trained is not None else None
    if kept is not None and not kept.is_file() and run.method != "dense":
        carried_out(run._replace(method="dense", sparsity=0.0), root, accelerator, kept)
    return carried_out(run, root, accelerator, kept)


def carried_out(run: Run, root: str, accelerator: str, kept: Path | None) -> dict[str, Any]:
    """Do what `result` says, the dense network being there or not asked for."""
    gc.collect()  # the run before, its data above all
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    metric = SETTINGS[run.setting].metric
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cfg = composed(run, root, folder, accelerator, kept)
        HydraConfig.instance().set_config(cfg)
        metrics = cli.train(cfg)
    assert isinstance(metrics, dict)
    value = metrics[metric] * (100 if is_more_better(metric) else 1)
    where = {"accelerator": torch.cuda.get_device_name()} if accelerator == "gpu" else {}
    return run._asdict() | {metric: value, "cpu_seconds": round(time.process_time() - start, 1)} | where
