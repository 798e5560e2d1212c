"""Text as documents, each in one of four disjoint splits. Pure: no tokenizer, no torch.

Reads local files (text, JSONL, Parquet, folders of them, ``demo``: the bundled text) and streamed data sets
(streamed.py), one document after another, never all at once. One long text is cut into pieces, which are its documents.

A document's split is what its record's own ``split`` says (local files only: elsewhere the word means other things),
else a hash of its text: 5 % each to score, select and report. By the text, not by a name or a place: so a text that
occurs twice, in one source or in two of a mixture, never lies in two splits.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from puzzle.config import SourceConfig
from puzzle.data import streamed
from puzzle.types import ConfigError, CorruptFileError

SPLITS = ("train", "score", "select", "report")
PIECE_CHARACTERS = 16_384
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".gz", ".parquet")
DEMO_TEXT = Path(__file__).parent.parent / "demo" / "text.jsonl.gz"
PARQUET_ROWS = 1024  # read at a time

Conversation = list[dict[str, Any]]  # as chat templates take it: [{"role": …, "content": …}, …]


@dataclass(frozen=True)
class Document:
    """``where`` it was found, for messages; ``content`` is a text or a conversation."""

    where: str
    split: str
    content: str | Conversation


def text_path(text: str) -> Path:
    """Where the text lies; ConfigError if nowhere."""
    path = DEMO_TEXT if text == "demo" else Path(text)
    if not path.exists():
        raise ConfigError(
            f"data.text: {text}: no such file or folder; give a .txt, .jsonl or .parquet file, a folder, or `demo`"
        )
    return path


def text_files(path: Path) -> list[Path]:
    """The file, or all text files in the folder."""
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in TEXT_SUFFIXES)
    if not files:
        raise ConfigError(f"{path}: no text in this folder; looked for {', '.join(TEXT_SUFFIXES)}")
    return files


def check_source(source: SourceConfig) -> None:
    """ConfigError if there is nothing to read: no such file, no text in the folder, or a library that is missing."""
    if source.path is not None:
        text_files(text_path(source.path))
    else:
        streamed.library(source)


def check_sources(sources: Iterable[SourceConfig]) -> None:
    """ConfigError for the first that cannot be read from."""
    for source in sources:
        check_source(source)


def documents(source: SourceConfig, start: int = 0) -> Iterator[Document]:
    """The documents of ``source``, from the ``start``-th on, in an order that never changes."""
    if source.path is not None:
        files = text_files(text_path(source.path))
        yield from islice((document for file in files for document in _in_file(source, file)), start, None)
        return
    for index, row in enumerate(streamed.rows(source, start), start):
        if (column := _column(source)) not in row:
            raise ConfigError(f"dataset {source.label}: no column {column!r}; columns: {', '.join(row)}")
        yield _document(source, f"dataset {source.label}: row {index}", row, own_split=False)


def _column(source: SourceConfig) -> str:
    return source.messages or source.column or "text"


def _in_file(source: SourceConfig, path: Path) -> Iterator[Document]:
    if ".jsonl" in path.suffixes:
        for number, row in _json_rows(path):
            yield _document(source, f"{path}:{number}", row, own_split=True)
    elif path.suffix == ".parquet":
        for index, row in enumerate(_parquet_rows(path, _column(source))):
            yield _document(source, f"{path}: row {index}", row, own_split=True)
    elif source.messages is not None or source.column is not None:
        raise ConfigError(f"{path}: plain text has no column {_column(source)!r}; give .jsonl or .parquet files")
    else:
        for index, piece in enumerate(_reads(path, lambda file: file.read(PIECE_CHARACTERS))):
            yield Document(f"{path}: piece {index}", _split_of(piece.encode()), piece)


def _document(source: SourceConfig, where: str, row: Any, own_split: bool) -> Document:
    column = _column(source)
    content: Any = row.get(column) if isinstance(row, dict) else None
    if not (_is_conversation(content) if source.messages is not None else isinstance(content, str)):
        kind = "a conversation [{role, content}, …]" if source.messages is not None else "a string"
        there = f"{column} is {_short(content)}" if isinstance(row, dict) and column in row else _short(row)
        raise CorruptFileError(f'{where}: expected a record with a "{column}" that is {kind}; {there}')
    split = row.get("split") if own_split else None
    if split is not None and split not in SPLITS:
        raise ConfigError(f"{where}: unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
    try:
        return Document(where, split or _split_of(text.encode()), content)
    except UnicodeEncodeError as error:  # JSON can spell halves of characters
        raise CorruptFileError(f"{where}: the text is not valid Unicode ({error})") from None


def _is_conversation(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in content
        )
    )


def _short(found: Any) -> str:
    if isinstance(found, dict):
        return f"found the keys {', '.join(found)}"
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _split_of(text: bytes) -> str:
    bucket = int.from_bytes(hashlib.sha256(text.strip()).digest()[:4], "big") % 100
    return "score" if bucket < 5 else "select" if bucket < 10 else "report" if bucket < 15 else "train"


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_reads(path, lambda file: file.readline()), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise CorruptFileError(f"{path}:{number}: no valid JSON ({error})") from None


def _reads(path: Path, read: Callable[[TextIO], str]) -> Iterator[str]:
    """What ``read`` gives, time and again, to the end of the file."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            while text := read(file):
                yield text
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path}: unreadable text ({error})") from None


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow; {streamed.EXTRA}") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ConfigError(f"{path}: no column {column!r}; columns: {', '.join(names)}")
            wanted = [name for name in (column, "split") if name in names]
            for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path}: unreadable Parquet ({' '.join(str(error).split())})") from None
