"""Tables of the user's own: read as they were written, and every mistake named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from puzzle.profiling.imported import read_table, write_table
from puzzle.profiling.table import ANY_ENGINE
from puzzle.types import CorruptFileError, Costs
from tests.profiling.test_table import COSTS

HEADER = "shape_id,phase,batch_size,context_tokens,weights,device,ms"
ROW = "ffn.linear,decode,8,128,bf16,h100,0.25"


def table(folder: Path, *lines: str) -> Path:
    path = folder / "costs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_was_written_is_read_back_with_its_source(tmp_path: Path) -> None:
    costs = Costs(tuple(COSTS))
    write_table(tmp_path / "costs.csv", costs, {"gpu": "NVIDIA H200", "date": "2026-01-01"})
    assert (tmp_path / "costs.csv").read_text().startswith("# gpu: NVIDIA H200\n# date: 2026-01-01\n")
    assert read_table(tmp_path / "costs.csv") == costs


def test_few_columns_are_needed(tmp_path: Path) -> None:
    (cost,) = read_table(table(tmp_path, "# measured by hand", "", HEADER, ROW)).rows
    assert (cost.kv, cost.tensor_parallel, cost.engine, cost.source) == ("bf16", 1, ANY_ENGINE, "imported")
    assert cost.ms == cost.ms_p10 == cost.ms_p90 == 0.25
    records = [{"shape_id": "rest", "phase": "prefill", "batch_size": 1, "context_tokens": 8, "weights": "fp32"}]
    (tmp_path / "costs.json").write_text(json.dumps([records[0] | {"device": "cpu", "ms": 1.5}]))
    (cost,) = read_table(tmp_path / "costs.json").rows
    assert (cost.kv, cost.ms, cost.source) == ("fp32", 1.5, "imported")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((HEADER, ROW.replace("0.25", "0")), r"costs\.csv:2: .*decode time is not a finite, positive number"),
        ((HEADER, ROW.replace("0.25", "-1")), r"costs\.csv:2: .*not a finite, positive number"),
        ((HEADER, ROW.replace("0.25", "nan")), r"costs\.csv:2: .*not a finite, positive number"),
        (
            ("# a note", HEADER, ROW, ROW.replace("0.25", "fast")),
            r"costs\.csv:4: .*ms: .* number.*\(found 'fast'\)",
        ),
        ((HEADER, ROW.replace("8,", "8.5,", 1)), r"costs\.csv:2: .*batch_size: .* valid integer.*'8.5'"),
        ((HEADER, ROW.replace("decode", "generation")), r"costs\.csv:2: .*phase"),
        ((HEADER + ",colour", ROW + ",red"), r"costs\.csv:2: .*colour"),
        ((HEADER, ROW + ",1"), r"costs\.csv:2: 7 columns expected"),
        ((HEADER.replace(",ms", ""), ROW.removesuffix(",0.25")), r"costs\.csv:2: no ms; needed: shape_id"),
        ((HEADER,), r"costs\.csv: no costs in it"),
    ],
)
def test_every_mistake_is_named_with_its_line(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_table(table(tmp_path, *lines))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ('{"ms": 1}', "expected a list"), ("[{}]", r"\[0\]: no shape_id")]
)
def test_json_that_is_no_table(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(CorruptFileError, match=message):
        read_table(tmp_path / "costs.json")
