"""What makes tokenised data stale: other text, another mixture; and what does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from puzzle import artifacts
from puzzle.config import DataConfig, SourceConfig, TokensConfig
from puzzle.data import inputs as data_inputs
from puzzle.data import streamed
from puzzle.data.inputs import MEMORY, pinned_sources
from puzzle.types import ConfigError

COMMIT = "0123456789abcdef" * 2 + "01234567"
SOME = TokensConfig(train=100, score=10, select=10, report=10)


def inputs_of(run_dir: Path, *sources: SourceConfig, **settings: Any) -> dict[str, str]:
    return data_inputs.data_inputs(DataConfig(sources=sources, **settings), run_dir)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    (tmp_path / "texts" / "b.txt").write_text("two")
    return tmp_path / "texts"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """What the hub answers, in turn."""
    answers: list[str | None] = []
    monkeypatch.setattr(streamed, "newest_commit", lambda source: answers.pop(0))
    yield answers
    assert not answers


def test_text_is_known_by_its_content_not_by_its_place(folder: Path, tmp_path: Path) -> None:
    source = SourceConfig(path=str(folder))
    before = inputs_of(tmp_path, source)
    shutil.copytree(folder, tmp_path / "moved")
    assert inputs_of(tmp_path, SourceConfig(path=str(tmp_path / "moved"))) == before
    (folder / "a.txt").write_text("One")
    changed = inputs_of(tmp_path, source)
    assert changed["text"] != before["text"]
    assert changed["mixing"] == before["mixing"]
    (folder / "a.txt").write_text("one")
    assert inputs_of(tmp_path, source) == before
    (folder / "a.txt").rename(folder / "c.txt")
    assert inputs_of(tmp_path, source) != before


def test_the_mixture_is_part_of_it_and_how_tokens_are_read_is_not(folder: Path, tmp_path: Path) -> None:
    halves = [SourceConfig(path=str(folder), weight=1.0), SourceConfig(path="demo", weight=1.0)]
    before = inputs_of(tmp_path, *halves)
    assert inputs_of(tmp_path, *halves, sequence_tokens=999, within_documents=True) == before
    assert inputs_of(tmp_path, *halves, tokens=SOME) != before
    assert inputs_of(tmp_path, halves[0], halves[1].model_copy(update={"weight": 2.0})) != before
    assert inputs_of(tmp_path, *reversed(halves)) != before
    assert inputs_of(tmp_path, halves[0], halves[1].model_copy(update={"column": "body"})) != before
    assert data_inputs.data_inputs(DataConfig(text="demo"), tmp_path) == inputs_of(tmp_path, SourceConfig(path="demo"))


def test_large_files_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    fingerprint = artifacts.file_fingerprint
    monkeypatch.setattr(artifacts, "file_fingerprint", lambda path: read.append(path) or fingerprint(path))
    source = SourceConfig(path=str(folder))
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    first = inputs_of(tmp_path, source)
    assert inputs_of(tmp_path, source) == first
    assert len(read) == 4  # too small to be remembered
    monkeypatch.setattr(data_inputs, "MANY_BYTES", 0)
    assert [inputs_of(tmp_path, source) for _ in range(3)] == [first] * 3
    assert len(read) == 6
    (folder / "a.txt").write_text("ONE")  # just now: its clock may not have moved on
    assert inputs_of(tmp_path, source) != first
    assert inputs_of(tmp_path, source) != first
    assert [path.name for path in read[6:]] == ["a.txt", "a.txt"]


def test_nothing_is_written_where_there_is_no_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_inputs, "MANY_BYTES", 0)
    os.utime(folder / "a.txt", (1e9, 1e9))
    inputs_of(tmp_path / "run", SourceConfig(path=str(folder)))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    inputs_of(tmp_path / "run", SourceConfig(path=str(folder)))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [MEMORY]


def test_a_run_stays_with_the_commit_it_found(tmp_path: Path, hub: list[str | None]) -> None:
    source = SourceConfig(dataset="some/thing")
    settings = DataConfig(sources=(source,), tokens=SOME)
    hub.append(COMMIT)
    first = data_inputs.data_inputs(settings, tmp_path)
    assert pinned_sources(settings, tmp_path) == (source.model_copy(update={"revision": COMMIT}),)
    assert data_inputs.data_inputs(settings, tmp_path) == first  # without asking again
    named = DataConfig(sources=(source.model_copy(update={"revision": COMMIT}),), tokens=SOME)
    (tmp_path / "other").mkdir()
    assert data_inputs.data_inputs(named, tmp_path / "other") == first  # nor for what is a commit


def test_what_the_hub_does_not_say_stays_as_written(tmp_path: Path, hub: list[str | None]) -> None:
    settings = DataConfig(sources=(SourceConfig(dataset="some/thing", revision="v1"),), tokens=SOME)
    hub.append(None)
    offline = data_inputs.data_inputs(settings, tmp_path)
    assert pinned_sources(settings, tmp_path) == settings.sources
    (tmp_path / "data").mkdir()
    assert data_inputs.data_inputs(settings, tmp_path) == offline  # what is made needs no network, nor becomes stale
    (tmp_path / "data").rmdir()
    hub.append(COMMIT)
    assert data_inputs.data_inputs(settings, tmp_path) != offline


def test_local_files_of_a_data_set_count_by_content(folder: Path, tmp_path: Path) -> None:
    def of(**place: Any) -> dict[str, str]:
        return inputs_of(tmp_path, SourceConfig(**place), tokens=SOME)

    (folder / "c").mkdir()
    parquet.write_table(pa.table({"text": ["x"]}), folder / "c" / "c.parquet")
    places: list[dict[str, Any]] = [
        {"dataset": str(folder)},
        {"dataset": "parquet", "data_files": str(folder / "**" / "*.parquet")},
    ]
    before = [of(**place) for place in places]
    assert before[0] != before[1]
    assert [of(**place) for place in places] == before
    parquet.write_table(pa.table({"text": ["y"]}), folder / "c" / "c.parquet")
    assert all(of(**place) != one for place, one in zip(places, before, strict=True))


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt: no such file or folder"):
        inputs_of(tmp_path, SourceConfig(path=str(tmp_path / "nowhere.txt")))
