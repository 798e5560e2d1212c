"""Text as documents, each in one of four disjoint splits. Pure: no tokenizer, no torch.

Reads ``demo`` (the bundled text), a ``.txt``/``.jsonl``/``.jsonl.gz`` file or a folder of text files. Splits are by
document: as its record says, else by a hash of its name; one long text is cut into pieces, which are its documents.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from puzzle.artifacts import file_fingerprint, fingerprint
from puzzle.types import ConfigError, CorruptFileError

SPLITS = ("train", "score", "select", "report")
PIECE_CHARACTERS = 16_384
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".gz")
DEMO_TEXT = Path(__file__).parent / "demo" / "text.jsonl.gz"


@dataclass(frozen=True)
class Document:
    name: str
    split: str
    text: str


def text_path(text: str) -> Path:
    """Where the text lies; ConfigError if nowhere."""
    path = DEMO_TEXT if text == "demo" else Path(text)
    if not path.exists():
        raise ConfigError(f"data.text: {text}: no such file or folder; give a .txt or .jsonl file, a folder, or `demo`")
    return path


def documents(path: Path) -> Iterator[Document]:
    """The documents at ``path``, each with its split."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.suffix in TEXT_SUFFIXES:
                yield from documents(file)
    elif ".jsonl" in path.suffixes:
        yield from _records(path)
    else:
        text = _read(path)
        pieces = [text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS)]
        for index, piece in enumerate(pieces):
            name = f"{path.name}#{index}"
            yield Document(name, _split_of(name), piece)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path}: unreadable text ({error})") from None


def _records(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(text, str):
            raise CorruptFileError(f'{path}:{number}: expected a JSON object with a "text"')
        name = str(record.get("path", f"{path.name}#{number}"))
        split = record.get("split") or _split_of(name)
        if split not in SPLITS:
            raise ConfigError(f"{path}:{number}: unknown split {split!r}; allowed: {', '.join(SPLITS)}")
        yield Document(name, split, text)


def _split_of(name: str) -> str:
    """5 % of the documents to each of score, select and report, by the name alone."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "score" if bucket < 5 else "select" if bucket < 10 else "report" if bucket < 15 else "train"


def text_fingerprint(path: Path) -> str:
    """By content: the file's, or those of all text files in the folder."""
    if path.is_file():
        return file_fingerprint(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in TEXT_SUFFIXES)
    return fingerprint({file.relative_to(path).as_posix(): file_fingerprint(file) for file in files})
