"""See what `train.py` would do with the same words: `python plan.py pruning=...`. Settings: `conf/plan.yaml`."""

import hydra
from omegaconf import DictConfig

from lightning_prune import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="plan")
def main(cfg: DictConfig) -> object:
    """Run what the command line says."""
    return cli.plan(cfg)


if __name__ == "__main__":
    cli.run(main)
