"""What is installed is what `constraints.txt` names, and fits together: `python .ci/audit.py [FOLDER ...]`.

Every distribution of this environment, and of folders beside it, has to be there at the version that is named. So
nothing comes in unseen, and `pip-audit --no-deps --disable-pip -r constraints.txt` looks at all of it where a service
that knows vulnerabilities can be reached; from where the checks are run here, none can.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
NOT_PINNED = {"pip", "lightning-prune"}
"""What every environment brings along, and what is being tested."""


def pinned(text: str) -> dict[str, str]:
    """Return the versions by name that a list of constraints names."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def faults(installed: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Say what is installed and not named, or in another version; "2.13.0+cpu" counts as "2.13.0"."""
    strangers = {n: v.partition("+")[0] for n, v in installed.items() if n not in NOT_PINNED}
    return [
        f"{name} {version}: constraints.txt names {wanted.get(name) or 'no version'}"
        for name, version in sorted(strangers.items())
        if wanted.get(name) != version
    ]


def main(folders: list[str]) -> int:
    wanted = pinned(CONSTRAINTS.read_text(encoding="utf-8"))
    found = [
        line
        for path in (None, *folders)
        for line in faults(
            {normal(d.name): d.version for d in (distributions(path=[path]) if path else distributions())},
            wanted,
        )
    ]
    for line in found:
        print(line)
    fits = subprocess.run([sys.executable, "-m", "pip", "check"], check=False)
    return int(bool(found) or fits.returncode != 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
