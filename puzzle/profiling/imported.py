"""Costs from a file of the user's own, or one that is shipped, and to such a file. Pure.

A CSV file has one row per :class:`~puzzle.types.Cost` with its fields for columns; lines that begin with ``#`` say
where it comes from. A JSON file is a list of such objects. Only these must be there: ``shape_id, phase, batch_size,
context_tokens, weights, device, ms``; the others have defaults (``kv`` as ``weights``, no parallelism, any engine).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from puzzle.profiling.table import ANY_ENGINE
from puzzle.types import CorruptFileError, Cost, Costs, from_json, to_json

NEEDED = ("shape_id", "phase", "batch_size", "context_tokens", "weights", "device", "ms")


def read_table(path: Path) -> Costs:
    """The records in ``path``. CorruptFileError names the line, or the entry, and what is wrong with it."""
    records = _json_records(path) if path.suffix == ".json" else _csv_records(path)
    rows = tuple(_cost(record, source) for source, record in records)
    if not rows:
        raise CorruptFileError(f"{path}: no costs in it; it needs a row per shape and point, with {', '.join(NEEDED)}")
    return Costs(rows)


def write_table(path: Path, costs: Costs, notes: Mapping[str, object]) -> None:
    """``costs`` as CSV, with ``notes`` (device, versions, date) in front."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in notes.items())
        writer = csv.DictWriter(file, list(Cost.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(to_json(cost) for cost in costs.rows)


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip() and line[0] != "#"]
    reader = csv.DictReader(line for _, line in numbered)
    for (number, _), row in zip(numbered[1:], reader, strict=True):
        source = f"{path}:{number}"
        if None in row or None in row.values():
            raise CorruptFileError(f"{source}: {len(reader.fieldnames or ())} columns expected; mend the line")
        yield source, {name: text for name, text in row.items() if text != ""}


def _json_records(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise CorruptFileError(f"{path}: expected a list of objects, one per cost")
    return [(f"{path}[{index}]", record) for index, record in enumerate(found)]


def _cost(record: dict[str, Any], source: str) -> Cost:
    if missing := [name for name in NEEDED if name not in record]:
        raise CorruptFileError(f"{source}: no {missing[0]}; needed: {', '.join(NEEDED)}")
    ms = record["ms"]
    defaults = {"kv": record["weights"], "tensor_parallel": 1, "engine": ANY_ENGINE, "ms_p10": ms, "ms_p90": ms}
    return from_json(Cost, {**defaults, "source": "imported", **record}, source)
