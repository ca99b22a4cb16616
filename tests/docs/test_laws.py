"""The tables of laws, faults and promises name tests that are there, and say something of each."""

import ast
import re
from functools import cache

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "laws.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def names_in(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def rows():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [
        line
        for line in lines
        if line.startswith("|") and not line.startswith(("|---", "| law |", "| fault |", "| promise |"))
    ]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip()[:50])
def test_each_law_has_a_test_that_is_there(row):
    law, named, *rest = row.strip("|").split("|")
    found = NAMED.findall(named)
    assert law.strip() and found and not "".join(rest).strip()
    assert NAMED.sub("", named).strip(" ,") == ""
    assert [f"{path}::{name}" for path, name in found if name not in names_in(path)] == []


def test_the_tables_are_long():
    assert len(rows()) > 40
