"""Random configurations of the command line, sensible and not, and what has to come of each.

A job is composed from `conf/` as `python train.py` composes it, and run in this process on a tiny network and a few
batches of the digits. It runs and reaches what was asked for, or it is refused before the first step by an error that
`train.py` shows without a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_prune import SparsityMonitor, cli, config
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.cli import training
from lightning_prune.cli.answers import answer

CONF = Path(__file__).resolve().parents[1] / "conf"
TINY = (
    *(
        "trainer=cpu",
        "trainer.max_epochs=2",
        "+trainer.limit_train_batches=6",
        "+trainer.limit_val_batches=1",
    ),
    *("+trainer.limit_test_batches=1", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"),
    *("data.batch_size=32", "logger=none"),
)
QUIET = ("callbacks.monitor.latency=false", "callbacks.monitor.show=false")
NETWORKS = {
    "mlp": ("model=mlp", "model.sizes=[64,12,8,10]"),
    "convnet": ("model=convnet", "model.width=2"),
    "resnet20": ("model=resnet20", "model.num_blocks=1"),
    "gpt": ("model=gpt", "data=tinyshakespeare", "data.block_size=8", "model.num_layers=1", "model.width=16"),
}
TEXT = "to be or not to be, that is the question\n" * 100
NONSENSE = (
    *(
        "-1",
        "0",
        "1",
        "2",
        "0.5",
        "1.5",
        "-0.3",
        "1e9",
        "1e-9",
        "nan",
        "inf",
        "null",
        "true",
        "text",
        "''",
        "[]",
    ),
    *("[1]", "[0.5,0.2]", "{}", "{a: 1}", "'1'", "10000000000000000000000", "0x10", "${seed}", "???"),
)
SENSIBLE: dict[str, tuple[str, ...]] = {
    "sparsity": ("0", "0.1", "0.5", "0.75", "0.9", "0.99", "{network.head: 0.5, *: 0.8}", "{*.nothing: 0.5}"),
    "include": (
        "null",
        "[network.hidden]",
        "[network]",
        "['*.weight']",
        "['re:.*head.*']",
        "[head]",
        "[nothing]",
    ),
    "exclude": ("[]", "[network.head]", "['*.head']", "['*']", "['re:(']", "[network.features.0]"),
    "unit": ("run", "epochs", "steps"),
    "start": ("0", "0.1", "0.5", "1", "2"),
    "end": ("0.3", "0.5", "1.0", "1", "2", "4"),
    "every": ("0.05", "0.1", "0.5", "1", "2"),
    "power": ("0.5", "1", "5"),
    "num_steps": ("1", "3"),
    "num_phases": ("1", "2", "5"),
    "p": ("1", "2", "0.5"),
    "reduction": ("mean", "sum", "max"),
    "normalize": ("mean", "max", "none"),
    "heads": ("dim", "whole", "keep"),
    "multiple_of": ("1", "2", "8"),
    "min_keep": ("0", "1", "2", "0.1", "0.5"),
    "indivisible": ("refuse", "dense"),
    "n": ("1", "2", "3"),
    "m": ("2", "4", "8"),
    "shrink": ("null", "end", "update", "never"),
    "rewind": ("weights", "learning_rate"),
    "checkpoint": ("last", "best"),
    "num_rounds": ("1", "2", "3"),
    "num_levels": ("1", "2"),
    "num_calibration_batches": ("1", "2", "100"),
    "epoch": ("0", "1"),
    "step": ("null", "0", "3", "15"),
    "drop_fraction": ("0", "0.3", "1"),
    "unit_of_depth": ("block", "branch"),
    "damping": ("0.01", "1.0"),
    "sparsities": ("{network.head: 0.5}", "{*: 0.7}", "{}", "{a: 2}"),
}
TRAINER = {
    "max_epochs": ("1", "2", "3"),
    "max_steps": ("1", "5", "9"),
    "max_time": ("'00:00:00:02'",),
    "precision": ("32-true", "bf16-mixed", "bf16-true", "64-true", "16-mixed", "16-true"),
    "accumulate_grad_batches": ("1", "2", "4"),
    "gradient_clip_val": ("0.5", "null", "0"),
    "limit_train_batches": ("2", "0.1", "1.0", "0"),
    "limit_val_batches": ("0", "2", "1.0"),
    "overfit_batches": ("1", "2", "0.05"),
    "fast_dev_run": ("true", "1", "2", "false"),
    "detect_anomaly": ("true",),
    "barebones": ("true",),
    "deterministic": ("true", "warn"),
    "val_check_interval": ("2", "0.5", "1.0"),
    "check_val_every_n_epoch": ("1", "2", "5"),
    "num_sanity_val_steps": ("0", "1"),
    "enable_checkpointing": ("false", "true"),
    "inference_mode": ("false",),
    "reload_dataloaders_every_n_epochs": ("1",),
}
OTHERS = {
    "seed": ("0", "3"),
    "test": ("true", "false"),
    "train": ("true", "false"),
    "ckpt_path": ("null", "{dense}", "nothing.ckpt", "last", "best"),
    "optimized_metric": ("val/acc", "[val/acc,sparsity]", "nothing"),
    "model.lr": ("1e-3", "0.1", "1e-12"),
    "model.weight_decay": ("0", "0.1"),
    "model.optimizer": ("adam", "adamw", "sgd"),
    "model.lr_schedule": ("constant", "cosine", "constant_then_cosine"),
    "model.sizes": ("[64,10]", "[64,4,10]", "[60,10]", "[64,8,9]", "[64]"),
    "model.width": ("1", "4"),
    "data.batch_size": ("1", "16", "4000"),
    "data.seed": ("1",),
    "callbacks.monitor.folder": ("null",),
    "pruning.report": ("true", "false"),
}
GROUPS = {
    "callbacks": ("default", "none", "best", "distillation"),
    "logger": ("none", "csv", "tensorboard"),
    "debug": ("default", "fast_dev_run", "overfit"),
    "data": ("digits", "mnist", "tinyshakespeare"),
    "experiment": ("digits_iterative", "lenet_300_100_mnist"),
}
CLEAR = re.compile(r"`[\w./\[\]'*{}:, -]+`|[Kk]ey|override|[Vv]alue|config|primary|Error|full_key|parse")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is typed behind `python train.py`; `{folder}` and `{dense}` are filled in when it runs."""

    recipe: str
    overrides: tuple[str, ...]


def random_job(seed: int) -> Job:
    """Return the job of a seed; of every two, one has only settings that there are, with values that make sense."""
    draw = Random(seed)
    chance = draw.choice([0.0, 0.25])
    recipe = draw.choice(choices("pruning"))
    network = draw.choices(list(NETWORKS), [6, 3, 1, 2])[0]
    found = [f"pruning={recipe}", *NETWORKS[network]]
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        found += noun(draw, recipe, chance)
    for _ in range(draw.choice([0, 1, 1, 2])):
        found += setting(draw, recipe, chance)
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        name = draw.choice(list(TRAINER))
        found.append(f"++trainer.{name}={value(draw, TRAINER[name], chance)}")
    for _ in range(draw.choice([0, 0, 1])):
        name = draw.choice(list(OTHERS))
        found.append(f"{name}={value(draw, OTHERS[name], chance)}")
    if draw.random() < 0.15:
        group = draw.choice(list(GROUPS))
        found.append(f"{group}={draw.choice(GROUPS[group])}")
    if draw.random() < chance / 4:
        found.append(misspelt(draw, draw.choice(found)))
    return Job(recipe, tuple(found))


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def noun(draw: Random, recipe: str, chance: float) -> list[str]:
    """Exchange a noun and change one of its settings; by chance those that the recipe or the noun does not have."""
    known = [axis for axis in config.AXES if axis in settings_of(recipe)]
    if not known and chance == 0.0:
        return []
    axis = draw.choice(list(config.AXES) if not known or draw.random() < chance else known)
    options = choices(f"pruning/{axis}")
    name = draw.choice([*options, "null"] if draw.random() < chance else options)
    found = [f"pruning/{axis}={name}"]
    fields = list(SENSIBLE) if draw.random() < chance else fields_of(axis, name)
    fields = [f for f in fields if chance or f in SENSIBLE]
    if draw.random() < 0.6 and fields:
        field = draw.choice(fields)
        found.append(f"pruning.{axis}.{field}={value(draw, SENSIBLE.get(field, ()), chance)}")
    return found


def setting(draw: Random, recipe: str, chance: float) -> list[str]:
    """Change a setting of the recipe; by chance one that it does not have."""
    everything = {name for made, _, more in config.PRUNING.values() for name in (*_names(made), *more)}
    known = [name for name in settings_of(recipe) if name not in config.AXES]
    if "window" in settings_of(recipe):
        known += ["window.end", "window.every", "window.start", "window.unit"]
    known = [name for name in known if chance or name.rpartition(".")[2] in SENSIBLE]
    if not known and chance == 0.0:
        return []
    name = draw.choice(sorted(everything) if not known or draw.random() < chance else [*known, "sparsity"])
    return [f"pruning.{name}={value(draw, SENSIBLE.get(name.rpartition('.')[2], ()), chance)}"]


@cache
def settings_of(recipe: str) -> tuple[str, ...]:
    """Return the names of a recipe's settings and nouns."""
    found = _names_in(CONF / "pruning" / f"{recipe}.yaml")
    return tuple(name for name in found if name not in ("_target_", "_convert_"))


def _names_in(path: Path) -> list[str]:
    text = path.read_text()
    if (own := re.search(r"/lightning_prune/(\w+)@pruning", text)) is not None:
        made, _, more = config.PRUNING[own[1]]
        return [*_names(made), *more]
    parents = re.findall(r"^  - (\w+)$", text, re.MULTILINE)
    return [name for parent in parents if parent != "_self_" for name in _names_in(path.with_stem(parent))]


@cache
def fields_of(axis: str, name: str) -> list[str]:
    """Return the settings of the noun in a yaml file."""
    path = CONF / "pruning" / axis / f"{name}.yaml"
    found = re.search(rf"/lightning_prune/{axis}/(\w+)@", path.read_text()) if path.is_file() else None
    return _names(config.nouns(axis)[found[1]]) if found else []


def _names(noun: type) -> list[str]:
    return [field.name for field in dataclasses.fields(noun)]


def value(draw: Random, sensible: tuple[str, ...], chance: float) -> str:
    return draw.choice(NONSENSE) if not sensible or draw.random() < chance else draw.choice(sensible)


def misspelt(draw: Random, override: str) -> str:
    name, _, rest = override.partition("=")
    place = draw.randrange(len(name))
    return f"{name[:place]}{name[place + 1 :]}={rest}"


def dense_checkpoint(folder: Path) -> str:
    """Train a dense network for a step, and return where it was saved."""
    from lightning_prune.examples.data import Digits
    from lightning_prune.examples.tasks import Classifier

    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(Classifier("MLP", sizes=[64, 12, 8, 10]), Digits(batch_size=32))
    trainer.save_checkpoint(path := folder / "dense.ckpt")
    return str(path)


class Unclear(Exception):  # noqa: N818
    """A job that broke a promise."""


def run(job: Job, dense: str) -> dict[str, Any]:
    """Run a job; returns its outcome ("ran", "refused", "late") and what it said.

    Raises:
        Unclear: an error that `train.py` would show as a traceback, or a run that has not done what was asked for.
    """
    folder = tempfile.mkdtemp(prefix="lightning_prune_fuzz_")
    (Path(folder) / TEXTS).write_text(TEXT)
    try:
        with silence(), Steps() as steps:
            try:
                cfg = composed(job, folder, dense)
                with Observed() as seen:
                    cli.train(cfg)
            except Exception as error:
                if (said := answer(error)) is None:
                    raise
                check(bool(CLEAR.search(said)), f"an error that does not say what is wrong: {said[:200]}")
                return {"outcome": "late" if steps.num else "refused", "said": said}
            check_reached(seen.trainer, cfg, job)
        return {"outcome": "ran", "steps": steps.num}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        GlobalHydra.instance().clear()


TEXTS = "tinyshakespeare.txt"


def composed(job: Job, folder: str, dense: str) -> DictConfig:
    GlobalHydra.instance().clear()
    here = [f"hydra.runtime.output_dir={folder}", "hydra.job.num=0"]
    names = ("callbacks=none", "callbacks=distillation")
    quiet = () if any(name in job.overrides for name in names[:1]) else QUIET
    data = [f"data.root={folder}"] if "data=tinyshakespeare" in job.overrides else []
    overrides = [o.replace("{dense}", dense) for o in job.overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("train", overrides=[*TINY, *quiet, *overrides, *data, *here], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


class Steps:
    """Counts the optimizer steps of all runs inside."""

    def __init__(self) -> None:
        self.num = 0

    def __enter__(self) -> Steps:
        def count(*_: Any) -> None:
            self.num += 1

        self._hook = register_optimizer_step_post_hook(count)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


class Observed:
    """Keeps the Trainer that `cli.train` makes."""

    trainer: L.Trainer

    def __enter__(self) -> Observed:
        self._make = make = training.trainer_of

        def trainer(cfg: DictConfig) -> L.Trainer:
            self.trainer = make(cfg)
            return self.trainer

        training.trainer_of = trainer
        return self

    def __exit__(self, *_: object) -> None:
        training.trainer_of = self._make


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def check_reached(trainer: L.Trainer, cfg: DictConfig, job: Job) -> None:
    """Refuse a run that neither reached its sparsity nor said so."""
    callbacks = [cb for cb in trainer.callbacks if isinstance(cb, PruningCallback)]  # type: ignore[attr-defined]
    check(bool(callbacks) == ("pruning" in cfg.callbacks), "the pruning callback was lost")
    for callback in callbacks:
        pruner = callback.pruner
        check(pruner is not None, "nothing was pruned, without a word")
        assert pruner is not None
        goal, reached = pruner.final_sparsity, getattr(pruner, "group_sparsity", pruner.sparsity)
        check(
            abs(goal - reached) < 0.15 + 0.5 / pruner.num_groups or bool(callback.warnings),
            f"asked for {goal:.3f}, reached {reached:.3f}",
        )
        check(
            goal == 0.0 or reached > 0.0 or bool(callback.warnings),
            f"asked for {goal:.3f}, nothing was pruned",
        )
    module = trainer.lightning_module
    for callback in callbacks:
        for name, mask in callback.masks.items():
            weight = dict(module.named_parameters())[name].detach()
            check(bool((weight[~mask] == 0).all()), f"`{name}` has pruned weights that are not zero")
    monitors = [cb for cb in trainer.callbacks if isinstance(cb, SparsityMonitor)]  # type: ignore[attr-defined]
    check(all(monitor.report is not None for monitor in monitors), "a report was asked for and not made")


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Unclear(what)
