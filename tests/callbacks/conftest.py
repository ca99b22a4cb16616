"""How tests start several real processes over gloo."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def launch(root, subprocess_env) -> Callable[..., None]:
    """Run a script of this folder in a number of processes that belong together, and refuse to go on if it fails.

    Starting processes takes longer than what they check: give one script all that one group of processes is to do.
    """

    def run(script: str, *arguments: object, num_processes: int = 2, timeout: float = 600) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        path = str(Path(__file__).with_name(script))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *launcher, path, *map(str, arguments)],
            cwd=root,
            env=subprocess_env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run
