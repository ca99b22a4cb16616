"""Imports go down only, and the nouns need no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_prune"
STANDARD = set(sys.stdlib_module_names)
# floor -> what it may import besides the standard library
FLOORS = {
    "core": {"torch", "lightning_prune.core"},
    "report": {"rich", "lightning_prune.report"},
    "graph": {"torch", "lightning_prune.core", "lightning_prune.graph"},
    "model": {
        "torch",
        "safetensors",
        "onnx",
        "onnxruntime",
        "triton",
        "lightning_prune.core",
        "lightning_prune.graph",
        "lightning_prune.model",
        "lightning_prune.report",
    },
    "callbacks": {
        "torch",
        "jsonargparse",
        "lightning_prune.nouns",
        "lightning",
        "torchmetrics",
        "numpy",
        "rich",
        "lightning_prune.core",
        "lightning_prune.graph",
        "lightning_prune.model",
        "lightning_prune.report",
        "lightning_prune.callbacks",
    },
    "examples": {
        "torch",
        "lightning",
        "torchmetrics",
        "numpy",
        "sklearn",
        "lightning_prune.core",
        "lightning_prune.examples",
    },
}
HYDRA = {"config.py"}
TOP = {"cli", "sweep"}  # folders whose modules stand at the top, too
# callbacks that users add: they do not know of each other
LEAVES = {"train_time", "post_training"}
TORCH_FREE = [
    "schedules",
    "windows",
    "ramp",
    "criteria.weights",
    "criteria.gradients",
    "criteria.activations",
    "granularities",
]
TORCH_FREE += [
    "masking",
    "scopes.rankings",
    "scopes.allocations",
    "scopes.patterns",
    "recipe",
    "patterns",
    "checks",
    "types",
]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{a.name}" for a in node.names}
                if node.module == "lightning_prune"
                else {node.module}
            )
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found - {"__future__"}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor):
    files = sorted((PACKAGE / floor).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            allowed = name.split(".")[0] in STANDARD or any(
                name == a or name.startswith(a + ".") for a in FLOORS[floor]
            )
            assert allowed, f"{file.relative_to(ROOT)} may not import {name}"


def test_only_the_top_imports_hydra():
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.parent.name not in TOP and (file.parent != PACKAGE or file.name not in HYDRA):
            bad = [name for name in imports(file) if name.split(".")[0] in {"hydra", "omegaconf"}]
            assert not bad, f"{file.relative_to(ROOT)} may not import {bad}"


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_callbacks_do_not_import_each_other(leaf):
    names = {name.rsplit(".", 1)[-1] for name in imports(PACKAGE / "callbacks" / f"{leaf}.py")}
    assert not names & (LEAVES | {"monitor"})


def test_the_nouns_are_checked_without_torch():
    code = "import sys, lightning_prune, lightning_prune.core.{}; assert 'torch' not in sys.modules"
    script = "\n".join(code.format(name) for name in TORCH_FREE)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented():
    import lightning_prune

    for name in lightning_prune.__all__:
        member = getattr(lightning_prune, name)
        assert member.__doc__, name
        assert not member.__doc__.startswith(f"{name}("), (
            f"{name} has only the docstring that dataclasses make"
        )
    assert set(lightning_prune.__all__) <= set(dir(lightning_prune))
    with pytest.raises(AttributeError, match="no attribute 'Prune'"):
        _ = lightning_prune.Prune


def test_the_lists_for_checkers_and_for_python_agree():
    """`__init__` names each public name twice: under TYPE_CHECKING, and in the table that loads it."""
    import lightning_prune

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = {
        a.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for a in node.names
        if a.asname
    }
    assert checked == set(lightning_prune.__all__)
