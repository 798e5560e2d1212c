"""The notebook that is shipped: short, without outputs, and it runs to an exported checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.pipeline.conftest import Project

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "pareto.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_short_and_stored_without_outputs() -> None:
    cells = read().cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(cells) < 15
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert not any(re.search(r"^\s*(async )?def |lambda", cell.source, re.MULTILINE) for cell in code)


def test_it_runs_from_a_run_to_a_checkpoint(copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts a kernel, torch in it, and the process that verifies the export: 10 s on a quiet machine."""
    monkeypatch.setenv("PUZZLE_RUN", str(copy.run))
    notebook = read()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [{kind for output in cell.outputs for kind in output.get("data", {})} for cell in code]
    assert sum("application/vnd.jupyter.widget-view+json" in kinds for kinds in shown) == 1
    assert sum("image/png" in kinds for kinds in shown) == 1
    assert "<svg" in code[4].outputs[0]["data"]["text/html"]
    (checkpoint,) = copy.folder.glob("my-limit-*-hf")
    assert (checkpoint / "model.safetensors").is_file()
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
