"""Data sets through the `datasets` library, all of them on this disk: what it streams, and what can go wrong."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from puzzle.config import SourceConfig
from puzzle.data import streamed
from puzzle.data.source import Document, documents
from puzzle.types import ConfigError, CorruptFileError, PuzzleError
from tests.data.factories import chat, texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two Parquet files of 30 and 20 rows."""
    for name, count in (("a", 30), ("b", 20)):
        table = pa.table({"text": texts(name, count), "split": ["somewhere"] * count})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    return tmp_path


def source_of(folder: Path, **settings: Any) -> SourceConfig:
    return SourceConfig(dataset="parquet", data_files=(str(folder / "*.parquet"),), **settings)


def test_every_row_is_a_document_wherever_reading_starts(folder: Path) -> None:
    found = list(documents(source_of(folder)))
    assert [document.content for document in found] == texts("a", 30) + texts("b", 20)
    assert {document.split for document in found} <= {"train", "score", "select", "report"}  # not the column's word
    for start in (1, 29, 30, 44, 50, 60):
        assert list(documents(source_of(folder), start)) == found[start:]


def test_a_folder_and_a_builder_give_the_same(folder: Path) -> None:
    by_folder = documents(SourceConfig(dataset=str(folder)))
    assert [document.content for document in by_folder] == [one.content for one in documents(source_of(folder))]


def test_a_stream_is_read_no_further_than_needed(folder: Path) -> None:
    (folder / "c.parquet").write_bytes(b"PAR1 but damaged PAR1")
    assert len(list(islice(documents(source_of(folder)), 50))) == 50


def test_json_conversations_and_other_columns(tmp_path: Path) -> None:
    records = [{"turns": chat("Why?", "So"), "body": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    place: dict[str, Any] = {"dataset": "json", "data_files": str(tmp_path / "a.jsonl")}
    assert [document.content for document in documents(SourceConfig(**place, column="body"))] == ["x"]
    (found,) = documents(SourceConfig(**place, messages="turns"))
    assert found.content == chat("Why?", "So")


def expect(error: type[PuzzleError], message: str, source: SourceConfig) -> None:
    with pytest.raises(error) as caught:
        list(documents(source))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_is_one_line_that_names_the_data_set(folder: Path) -> None:
    expect(ConfigError, "no column 'body'; columns: text, split", source_of(folder, column="body"))
    expect(ConfigError, "*.parquet): cannot be opened (Bad split: dev", source_of(folder, split="dev"))
    expect(ConfigError, "dataset parquet (nowhere.parquet): cannot be opened",
           SourceConfig(dataset="parquet", data_files=("nowhere.parquet",)))  # fmt: skip
    expect(ConfigError, "cannot be opened", SourceConfig(dataset=str(folder / "nowhere"), data_files=("x",)))


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "a.parquet")
    expect(
        CorruptFileError, 'row 1: expected a record with a "text" that is a string; text is None', source_of(tmp_path)
    )


def test_damaged_files_are_found_at_once_or_on_the_way(folder: Path) -> None:
    (folder / "c.parquet").write_bytes(b"PAR1 but damaged PAR1")
    expect(CorruptFileError, "unreadable after 50 rows", source_of(folder))
    (folder / "0.parquet").write_bytes(b"PAR1 but damaged PAR1")
    expect(CorruptFileError, "dataset parquet", source_of(folder))


def test_a_host_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'some/thing' on the Hub\n(ConnectTimeout)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    expect(
        ConfigError,
        "dataset some/thing/small: cannot be opened (Couldn't reach 'some/thing' on the Hub (ConnectTimeout))",
        SourceConfig(dataset="some/thing", name="small"),
    )


def test_a_host_that_goes_away_on_the_way_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def skip(self, start: int) -> Any:
            assert start == 5
            yield {"text": "x"}
            raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Stream())
    found: list[Document] = []
    with pytest.raises(CorruptFileError, match=r"unreadable after 6 rows \(Server Disconnected\); the same command"):
        found.extend(documents(SourceConfig(dataset="some/thing"), 5))


def test_the_library_is_asked_for_exactly_what_the_source_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *place, **settings: asked.append((place, settings)))
    streamed._open(SourceConfig(dataset="some/thing", name="small", revision="abc", data_files=("a.json",)))
    streamed._open(SourceConfig(dataset="some/thing", split="dev"))
    first = {"split": "train", "revision": "abc", "data_files": ["a.json"], "streaming": True}
    second = {"split": "dev", "revision": None, "data_files": None, "streaming": True}
    assert asked == [(("some/thing", "small"), first), (("some/thing", None), second)]


def test_only_a_hubs_revision_can_be_unknown(tmp_path: Path) -> None:
    assert streamed.is_pinned(SourceConfig(path="demo"))
    assert streamed.is_pinned(SourceConfig(dataset=str(tmp_path)))
    assert streamed.is_pinned(SourceConfig(dataset="parquet", data_files=("a.parquet",)))
    assert not streamed.is_pinned(SourceConfig(dataset="some/thing"))
    assert not streamed.is_pinned(SourceConfig(dataset="some/thing", revision="main"))
    assert not streamed.is_pinned(SourceConfig(dataset="some/thing", data_files=("a.parquet",)))
    assert not streamed.is_pinned(SourceConfig(dataset="squad"))
    assert streamed.is_pinned(SourceConfig(dataset="some/thing", revision="0123456789abcdef" * 2 + "01234567"))


def test_the_commit_is_the_hubs_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    class Info:
        sha = "f" * 40

    asked: list[tuple[str, Any]] = []

    def info(self: Any, name: str, *, revision: str | None, timeout: float) -> Info:
        asked.append((name, revision))
        if revision == "gone":
            raise OSError("offline")
        return Info()

    monkeypatch.setattr(HfApi, "dataset_info", info)
    assert streamed.newest_commit(SourceConfig(dataset="some/thing")) == "f" * 40
    assert streamed.newest_commit(SourceConfig(dataset="some/thing", revision="gone")) is None
    assert asked == [("some/thing", None), ("some/thing", "gone")]
