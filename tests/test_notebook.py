"""docs/quickstart.ipynb runs from its first cell to its last."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def test_the_quickstart_runs(tmp_path, monkeypatch):
    # The kernel finds this checkout and this Python.
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        "it is stored without what it printed"
    )
    client = NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    results = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "execute_result"
    ]
    assert results == ["0"] * 4, "an exit status is not 0"
    printed = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "4, 1280)" in printed
    assert (tmp_path / "report.html").exists()
