"""Write a model into a file: `python export.py ckpt_path=... format=onnx`. Settings: `conf/export.yaml`."""

import hydra
from omegaconf import DictConfig

from lightning_prune import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> object:
    """Run what the command line says."""
    return cli.export(cfg)


if __name__ == "__main__":
    cli.run(main)
