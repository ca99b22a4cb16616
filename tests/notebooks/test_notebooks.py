"""The notebooks run from top to bottom in a folder of their own, and what is committed can be shown to anyone."""

from __future__ import annotations

import json
import runpy

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_there_are_notebooks():
    assert {"quickstart", "structured", "sparse_training", "sweep"} <= {path.stem for path in NOTEBOOKS}


@by_name
def test_what_is_committed_is_small_has_its_outputs_and_names_no_machine(path):
    assert path.stat().st_size < 400_000
    text = path.read_text(encoding="utf-8")
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert not any(place in text for place in ("/root", "/home", "/tmp", "/work", "site-packages"))


@by_name
def test_there_is_one_idea_in_a_cell(path):
    code = cells(path, "code")
    assert all(len("".join(cell["source"]).splitlines()) <= 40 for cell in code)
    assert len(cells(path, "markdown")) >= len(code) - 1


@pytest.mark.slow
@by_name
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    pytest.importorskip("ipykernel", reason="the extra `docs` is not installed")
    pytest.importorskip("nbclient", reason="the extra `docs` is not installed")
    done = runpy.run_path(str(FOLDER / "execute.py"))["execute"](path, tmp_path)
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
