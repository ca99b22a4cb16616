"""A terminal for commands under test: what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def run_in_terminal(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], width: int = 160
) -> tuple[int, str]:
    """Run a command in a pseudo-terminal; return its code, and all that was written, without colours and moves."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    known = {name: value for name, value in env.items() if name not in ("COLUMNS", "NO_COLOR")}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, cwd=cwd, env={**known, "TERM": "xterm-256color"}, **streams)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), CODES.sub("", written.decode(errors="replace"))
