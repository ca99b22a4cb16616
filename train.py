"""Train and prune a model: `python train.py pruning=global_unstructured`. All settings are in `conf/train.yaml`."""

import hydra
from omegaconf import DictConfig

from lightning_prune import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> object:
    """Run what the command line says."""
    return cli.train(cfg)


if __name__ == "__main__":
    cli.run(main)
