"""Composing the project's configuration as its command line does, and running it in this process."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

CONF = Path(__file__).resolve().parents[1] / "conf"
SMALL = (
    "trainer=cpu",
    "trainer.max_epochs=2",
    "+trainer.limit_train_batches=10",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "data.batch_size=64",
)
QUIET = ("callbacks.monitor.latency=false", "callbacks.monitor.show=false")


def composed(*overrides: str, config_name: str = "train", output_dir: str | Path = "unused") -> DictConfig:
    """The configuration of a job, with Hydra's own values in place, as inside of a `hydra.main` function."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        runtime = [f"hydra.runtime.output_dir={output_dir}", "hydra.job.num=0"]
        cfg = compose(config_name, overrides=[*overrides, *runtime], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def options(group: str) -> list[str]:
    """The names of a group's configs, as they lie in the folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
