"""Runs the notebooks and keeps their outputs: `python notebooks/execute.py [notebook ...]`, about a minute each.

They are committed with their outputs, so that the pictures are seen where the notebooks are read, and the site is built
without training anything. What changes with every run and says nothing (counters, times, identities) is left out.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
TIMEOUT = 900  # seconds on the clock: machines may be busy
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder of its own, with the Python that runs this, and return it with its outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join([str(ROOT), before.get("PYTHONPATH", "")])}
    os.environ |= {"OMP_NUM_THREADS": "1", "JUPYTER_PATH": str(_kernel_of_this_python(folder))}
    try:
        client = NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name="this", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    finally:
        os.environ.clear()
        os.environ |= before
    return notebook


def _kernel_of_this_python(folder: Path) -> Path:
    """Describe the running interpreter as a kernel: one that is installed elsewhere may be another Python."""
    from ipykernel.kernelspec import write_kernel_spec

    data = folder / ".jupyter"
    write_kernel_spec(str(data / "kernels" / "this"), overrides={"display_name": "this"})
    return data


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook without what changes with every run and says nothing."""
    notebook.metadata = {"language_info": {"name": "python"}}
    for at, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{at}", {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("execution_count", None)
                output.pop("metadata", None)
                if output.output_type in ("display_data", "execute_result"):
                    output["metadata"] = {}
                    if output.output_type == "execute_result":
                        output["execution_count"] = None
                    if "image/png" in output.data:
                        output.data = {"image/png": output.data["image/png"]}
    return notebook


if __name__ == "__main__":
    for source in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        temporary = Path(tempfile.mkdtemp())
        try:
            done = cleaned(execute(source, temporary))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        nbformat.write(done, source)
        print(f"{source.name}: {source.stat().st_size / 1024:.0f} kB")
