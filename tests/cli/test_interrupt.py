from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.hydra_runs import QUIET


@pytest.mark.slow
def test_ctrl_c_ends_a_run_at_once_and_in_order(root, subprocess_env, tmp_path):
    command = [
        sys.executable,
        "train.py",
        "pruning=gradual",
        "trainer=cpu",
        "trainer.max_epochs=100000",
        *QUIET,
    ]
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        [*command, f"hydra.run.dir={tmp_path}"],
        cwd=root,
        env=subprocess_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while process.poll() is None and not checkpoint.is_file():
            time.sleep(0.2)
        output = None
        for _ in range(
            3
        ):  # seen once on a loaded machine: an interrupt was lost, and a user would press again
            os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=30)
                break
    finally:
        process.kill()
    assert process.returncode == 1
    assert output is not None and b"Traceback" not in output
    assert checkpoint.is_file()
