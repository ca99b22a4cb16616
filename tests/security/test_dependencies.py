"""What is installed is what is named: ranges of the project, exact versions for its tests, and nothing unseen."""

import importlib.util
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WANTED = [
    Requirement(line)
    for part in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in part
    if not line.startswith("lightning-prune")
]


def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_what_the_project_asks_for_is_pinned_within_its_range(wanted):
    module = audit()
    pins = module.pinned(module.CONSTRAINTS.read_text(encoding="utf-8"))
    assert wanted.specifier.contains(pins[module.normal(wanted.name)])


def test_versions_that_were_compromised_are_excluded():
    lightning = next(wanted for wanted in WANTED if wanted.name == "lightning")
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3"))


def test_what_nobody_named_is_found():
    module = audit()
    wanted = module.pinned("# comment\ntorch==2.13.0\nA_b.c==1.0  # why\n")
    installed = {"torch": "2.13.0+cpu", "a-b-c": "1.1", "stranger": "0.1", "pip": "26.3"}
    assert module.faults(installed, wanted) == [
        "a-b-c 1.1: constraints.txt names 1.0",
        "stranger 0.1: constraints.txt names no version",
    ]


def test_all_versions_are_exact_and_each_is_named_once():
    lines = [
        line
        for line in audit().CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        if line[:1] not in ("#", "")
    ]
    assert all(line.count("==") == 1 and "*" not in line for line in lines)
    names = [audit().normal(line.partition("==")[0]) for line in lines]
    assert len(names) == len(set(names))
