"""`puzzle show library`: the table says what the markers and the files of the library hold."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file

from puzzle.artifacts import MARKER, read_unit
from puzzle.report.library import draw, library_frame
from puzzle.run import Run
from tests.pipeline.conftest import Project


def rows_by_item(frame: pd.DataFrame) -> dict[str, Any]:
    return {f"{row.site}.{row.variant}": row for row in frame.itertuples()}


def test_the_table_is_what_lies_in_the_library(finished: Project) -> None:
    run = Run.open(finished.config)
    rows = rows_by_item(library_frame(run))
    assert rows.keys() == run.units.keys()
    assert len(rows) == 8
    for unit, row in rows.items():
        trained, tensors = read_unit(run.trained(unit)), load_file(run.trained(unit) / "weights.safetensors")
        assert (row.loss_start, row.loss_end) == (trained.payload["before"][unit], trained.payload["after"][unit])
        assert row.tokens == 64  # as many as distill.tokens
        assert row.bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert row.start == read_unit(run.initial(unit)).payload["start"]
        assert row.failed == ""


def test_a_failed_unit_has_a_reason_and_no_losses(finished: Project, tmp_path: Path) -> None:
    shutil.copytree(finished.run, tmp_path / "run")
    run, unit = Run.open(finished.config, [f"run={tmp_path / 'run'}"]), "L001.ffn.linear"
    marker = json.loads((run.trained(unit) / MARKER).read_text())
    marker["payload"] = {"tokens": 32, "failed": "its loss was not finite within the first 1 steps"}
    (run.trained(unit) / MARKER).write_text(json.dumps(marker))
    frame = library_frame(run)
    row = rows_by_item(frame)[unit]
    assert math.isnan(row.loss_start) and math.isnan(row.loss_end)
    assert (row.tokens, row.failed) == (32, marker["payload"]["failed"])
    draw(frame, tmp_path / "library.png")
    assert (tmp_path / "library.png").read_bytes().startswith(b"\x89PNG")
