"""The guide for torchvision and timm, run as it is written, with the real libraries.

Run it in an environment that has them (`pip install --no-deps -r benchmarks/requirements-zoo.txt`):
`python -m benchmarks.zoo_guide`. Where torchvision's build does not fit that of torch, its compiled operators, which
only detection models call, are declared. The tests run the same guide on a network that stands in for torchvision's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guides" / "torchvision-timm.md"
FROM_TORCHVISION = ("from torchvision.models import resnet18", "model = resnet18(num_classes=10)")
FROM_TIMM = ("import timm", 'model = timm.create_model("resnet18", num_classes=10)')
START = "import sys; from benchmarks.zoo.torchvision_ops import declare_operators; declare_operators(); "


def script_of(text: str) -> str:
    """Return the script of the guide."""
    (script,) = re.findall(r'```python title="shrink_resnet.py"\n(.*?)```', text, flags=re.DOTALL)
    return str(script)


def for_timm(script: str) -> str:
    """Return the script as the guide says that it is changed for timm."""
    for before, after in zip(FROM_TORCHVISION, FROM_TIMM, strict=True):
        assert before in script, before
        script = script.replace(before, after)
    return script


def run(script: str) -> str:
    """Run a script in a folder of its own, and return what it says."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shrink_resnet.py"
        file.write_text(script)
        start = f"{START}import runpy; runpy.run_path({str(file)!r}, run_name='__main__')"
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", start], cwd=folder, env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip()


def main() -> None:
    script = script_of(GUIDE.read_text(encoding="utf-8"))
    for name, text in {"torchvision": script, "timm": for_timm(script)}.items():
        print(f"{name}: {run(text)}")


if __name__ == "__main__":
    main()
