"""See what pruning each layer costs: `python sensitivity.py ckpt_path=...`. Settings: `conf/sensitivity.yaml`."""

import hydra
from omegaconf import DictConfig

from lightning_prune import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="sensitivity")
def main(cfg: DictConfig) -> object:
    """Run what the command line says."""
    return cli.analyse(cfg)


if __name__ == "__main__":
    cli.run(main)
