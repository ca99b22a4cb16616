"""A job of a sweep as a run of its own, for those who read the command line: Lightning starts DDP's processes by it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, read_write

FLAGS = ("config_path", "config_name", "config_dir")
OF_A_SWEEP = ("hydra.mode=", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
OF_A_GROUP = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def as_a_run_of_its_own() -> Iterator[None]:
    """Let the command line be that of this job alone, and leave no trace of its process group to the next one.

    Otherwise each process that DDP starts would run the whole sweep once more, and the next job in this process would
    take itself for a part of the last one's group.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        yield
        return
    arguments = sys.argv
    surroundings = {name: os.environ.get(name) for name in OF_A_GROUP}
    sys.argv = command_of_this_job(arguments)
    hydra = HydraConfig.get()
    with read_write(hydra.run):  # type: ignore[arg-type]  # a DictConfig that is typed as what it holds
        hydra.run.dir = hydra.runtime.output_dir
    try:
        yield
    finally:
        sys.argv = arguments
        _leave_group()
        for name, value in surroundings.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def command_of_this_job(arguments: list[str]) -> list[str]:
    """Return the command line that runs this job without the others.

    Args:
        arguments: the command line of the sweep, its script first.
    """
    given = vars(get_args_parser().parse_args(arguments[1:]))
    flags = [f"--{flag.replace('_', '-')}={given[flag]}" for flag in FLAGS if given[flag] is not None]
    overrides = HydraConfig.get().overrides
    about_hydra = [str(o) for o in OmegaConf.to_container(overrides.hydra) or []]
    kept = [override for override in about_hydra if not override.startswith(OF_A_SWEEP)]
    return [arguments[0], *flags, *(str(override) for override in overrides.task), *kept]


def _leave_group() -> None:
    if (distributed := sys.modules.get("torch.distributed")) is None:
        return
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
