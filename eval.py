"""Evaluate a checkpoint, pruned or not: `python eval.py ckpt_path=...`. All settings are in `conf/eval.yaml`."""

import hydra
from omegaconf import DictConfig

from lightning_prune import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg: DictConfig) -> object:
    """Run what the command line says."""
    return cli.evaluate(cfg)


if __name__ == "__main__":
    cli.run(main)
