"""Text from files: the four splits are disjoint, whatever is wrong with a file is named with its place."""

from __future__ import annotations

import builtins
import gzip
import json
import sys
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from puzzle.checkpoint import DEMO_TEACHER
from puzzle.config import SourceConfig
from puzzle.data.source import PIECE_CHARACTERS, SPLITS, Document, check_source, documents, text_path
from puzzle.types import ConfigError, CorruptFileError, PuzzleError
from tests.data.factories import chat, text_file, texts, write_jsonl


def found_in(path: Path, **settings: str) -> list[Document]:
    return list(documents(SourceConfig(path=str(path), **settings)))  # type: ignore[arg-type]


def test_the_bundled_text_keeps_its_four_splits_apart() -> None:
    by_split: dict[str, set[str]] = {split: set() for split in SPLITS}
    for document in documents(SourceConfig(path="demo")):
        assert isinstance(document.content, str)
        by_split[document.split].add(document.content.strip())
    assert [len(contents) for contents in by_split.values()] == [570, 21, 27, 38]  # distinct ones
    assert len(set.union(*by_split.values())) == 656


def test_no_file_is_most_of_a_split_of_the_bundled_text() -> None:
    sizes: dict[str, list[int]] = {split: [] for split in SPLITS}
    for document in documents(SourceConfig(path="demo")):
        sizes[document.split].append(len(document.content))
    assert {split for split, of in sizes.items() if max(of) > sum(of) / 2} == set()


def test_the_bundled_files_keep_their_limits() -> None:
    assert text_path("demo").stat().st_size <= 3_000_000
    assert (DEMO_TEACHER / "model.safetensors").stat().st_size <= 12_000_000
    assert 2048 <= len(AutoTokenizer.from_pretrained(DEMO_TEACHER)) <= 4096


def test_text_comes_from_files_folders_and_archives(tmp_path: Path) -> None:
    long = "".join(f"{number} " for number in range(8000))
    (tmp_path / "a.txt").write_text(long)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as lines:
        lines.write(json.dumps({"split": "report", "text": "hello"}) + "\n\n")
    parquet.write_table(pa.table({"text": ["one", "two"], "split": [None, "score"]}), tmp_path / "c.parquet")
    (tmp_path / "d.bin").write_bytes(b"\xff")
    found = found_in(tmp_path)
    pieces = [document.content for document in found[:-3]]
    assert "".join(pieces) == long  # type: ignore[arg-type]
    assert {len(piece) for piece in pieces[:-1]} == {PIECE_CHARACTERS}
    assert [document.content for document in found[-3:]] == ["hello", "one", "two"]
    assert [found[-3].split, found[-1].split] == ["report", "score"]


def test_line_ends_and_odd_characters_stay_as_they_are(tmp_path: Path) -> None:
    text = "a\r\nb\u2028c\x85d\re"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert [document.content for document in found_in(tmp_path / "a.txt")] == [text]
    text_file(tmp_path / "b.jsonl", [text])
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", newline="\n")
    assert [document.content for document in found_in(tmp_path / "b.jsonl")] == [text]
    assert [document.content for document in found_in(tmp_path / "c.jsonl")] == [text]


@pytest.mark.parametrize("start", [0, 1, 5, 7, 8, 100])
def test_reading_can_start_anywhere(tmp_path: Path, start: int) -> None:
    text_file(tmp_path / "a.jsonl", texts("a", 5))
    parquet.write_table(pa.table({"text": texts("b", 3)}), tmp_path / "b.parquet")
    source = SourceConfig(path=str(tmp_path))
    assert list(documents(source, start)) == list(islice(documents(source), start, None))


def test_splits_have_their_shares_and_equal_texts_share_theirs(tmp_path: Path) -> None:
    once = found_in(text_file(tmp_path / "many.jsonl", texts("x", 4000)))
    for split in ("score", "select", "report"):
        assert 0.03 < sum(document.split == split for document in once) / len(once) < 0.07
    again = found_in(text_file(tmp_path / "elsewhere.jsonl", [f"\n{text} " for text in reversed(texts("x", 4000))]))
    assert [document.split for document in again] == [document.split for document in reversed(once)]


def test_conversations_are_documents_too(tmp_path: Path) -> None:
    turns = chat("Why?", "So")
    write_jsonl(tmp_path / "a.jsonl", [{"chat": turns}, {"chat": turns}])
    parquet.write_table(pa.table({"chat": [turns]}), tmp_path / "b.parquet")
    found = found_in(tmp_path, messages="chat")
    assert [document.content for document in found] == [turns] * 3
    assert len({document.split for document in found}) == 1


def expect(error: type[PuzzleError], message: str, path: Path, **settings: str) -> None:
    with pytest.raises(error) as caught:
        found_in(path, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_records_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    cases: list[tuple[str, type[PuzzleError], str]] = [
        ('{"text": "x", "split": "dev"}', ConfigError, "bad.jsonl:2: unknown split 'dev'; allowed: train, score"),
        ('{"txt": "x", "id": 1}', CorruptFileError, 'bad.jsonl:2: expected a record with a "text" that is a string; '
         "found the keys txt, id"),
        ('{"text": null}', CorruptFileError, 'bad.jsonl:2: expected a record with a "text" that is a string; '
         "text is None"),
        ('["text"]', CorruptFileError, "bad.jsonl:2: expected a record"),
        ('{"text": "x"', CorruptFileError, "bad.jsonl:2: no valid JSON"),
        ('{"text": "\\ud800"}', CorruptFileError, "bad.jsonl:2: the text is not valid Unicode"),
    ]  # fmt: skip
    for line, error, message in cases:
        path.write_text(f'{{"text": "fine"}}\n{line}\n')
        expect(error, message, path)


@pytest.mark.parametrize("messages", ["hello", [], ["hello"], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_bad_conversations_are_named(tmp_path: Path, messages: object) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    expect(CorruptFileError, 'a.jsonl:1: expected a record with a "messages" that is a conversation',
           tmp_path / "a.jsonl", messages="messages")  # fmt: skip


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-10])
    expect(CorruptFileError, "cut.jsonl.gz: unreadable", tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.txt.gz").write_bytes(b"plain")
    expect(CorruptFileError, "no.txt.gz: unreadable", tmp_path / "no.txt.gz")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    expect(CorruptFileError, "latin.txt: unreadable", tmp_path / "latin.txt")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and nothing else")
    expect(CorruptFileError, "no.parquet: unreadable Parquet", tmp_path / "no.parquet")
    parquet.write_table(pa.table({"text": texts("a", 3000, 50)}), tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-300])
    expect(CorruptFileError, "cut.parquet: unreadable Parquet", tmp_path / "cut.parquet")


def test_damage_in_the_middle_of_a_parquet_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "mid.parquet"
    parquet.write_table(pa.table({"text": texts("a", 20_000)}), path, row_group_size=5000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 500] = b"\xff" * 500
    path.write_bytes(data)
    expect(CorruptFileError, "mid.parquet: unreadable Parquet", path)


def test_an_unknown_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    expect(ConfigError, "a.parquet: no column 'text'; columns: body, id", tmp_path / "a.parquet")
    assert found_in(tmp_path / "a.parquet", column="body")[0].content == "x"
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    expect(CorruptFileError, "b.parquet: row 1: expected", tmp_path / "b.parquet")
    (tmp_path / "a.txt").write_text("x")
    expect(ConfigError, "a.txt: plain text has no column 'body'", tmp_path / "a.txt", column="body")


def test_what_is_not_there_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        check_source(SourceConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no text in this folder; looked for \.txt"):
        check_source(SourceConfig(path=str(tmp_path)))
    check_source(SourceConfig(path="demo"))


def test_libraries_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"needs the `datasets` library; pip install 'puzzle-nas\[data\]'"):
        check_source(SourceConfig(dataset="some/thing"))
    expect(
        ConfigError, "a.parquet: reading Parquet needs pyarrow; pip install 'puzzle-nas[data]'", tmp_path / "a.parquet"
    )


def test_a_file_that_cannot_be_opened_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = text_file(tmp_path / "a.jsonl", ["x"])
    monkeypatch.setattr(
        builtins, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    expect(CorruptFileError, "a.jsonl: unreadable text ([Errno 13] Permission denied)", path)
