"""What the tokenised data is made from, as fingerprints: local files by content, streamed data sets by commit. Pure.

Reads the files (large ones once: ``text-fingerprints.json`` in the run's folder remembers them by size and time of
change) and asks the hub for the commit of a data set whose revision is not one, once in a run. Writes that file alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puzzle.artifacts import fingerprint, known_fingerprint, remembered
from puzzle.config import DataConfig, SourceConfig
from puzzle.data import streamed
from puzzle.data.source import text_files, text_path
from puzzle.types import ConfigError

FORMAT = 2  # of the unit: one more whenever the same text would be written otherwise
MEMORY = "text-fingerprints.json"
MANY_BYTES = 100_000_000


def data_inputs(data: DataConfig, run_dir: Path) -> dict[str, str]:
    """Named fingerprints of the text and of how it is mixed; sequence length and attention are no part of it."""
    with remembered(run_dir / MEMORY) as known:
        sources = [
            [_address(source), _contents(_files(source), known)]
            for source in _pinned(data, known, ask=not (run_dir / "data").exists())
        ]
    amounts = data.tokens.model_dump() if data.tokens is not None else None
    mixing = [FORMAT, amounts, [source.weight for source in data.all_sources]]
    return {"text": fingerprint(sources), "mixing": fingerprint(mixing)}


def source_fingerprint(source: SourceConfig, run_dir: Path) -> str:
    """Of a source alone. ConfigError for a data set on a hub whose revision is not a commit."""
    if not streamed.is_pinned(source):
        raise ConfigError(f"dataset {source.label}: name a commit as its revision")
    with remembered(run_dir / MEMORY) as known:
        return fingerprint([_address(source), _contents(_files(source), known)])


def pinned_sources(data: DataConfig, run_dir: Path) -> tuple[SourceConfig, ...]:
    """The sources, those on a hub at the commit their revision stood at when :func:`data_inputs` first asked.

    A run stays with one commit, and needs no network once its data is made. What cannot be reached stays as written.
    """
    with remembered(run_dir / MEMORY) as known:
        return _pinned(data, known, ask=False)


def _pinned(data: DataConfig, known: dict[str, Any], ask: bool) -> tuple[SourceConfig, ...]:
    found = []
    for source in data.all_sources:
        if not streamed.is_pinned(source):
            key = f"{source.dataset}@{source.revision or 'main'}"
            commit = known.get(key) or (streamed.newest_commit(source) if ask else None)
            if commit is not None:
                known[key] = commit
                source = source.model_copy(update={"revision": commit})
        found.append(source)
    return tuple(found)


def _address(source: SourceConfig) -> list[Any]:
    """What of the settings decides which documents there are; where local files lie does not."""
    hub = streamed.on_hub(source)
    remote = [pattern for pattern in source.data_files if hub or "://" in pattern]
    place = [source.dataset if hub else None, source.name, source.split, source.revision, remote]
    return [place, source.column, source.messages]


def _files(source: SourceConfig) -> list[tuple[str, Path]]:
    """Local files, with their names inside the folder that was given, or how the name of a single file ends."""
    root = text_path(source.path) if source.path is not None else Path(str(source.dataset))
    files = text_files(root) if source.path is not None else streamed.local_files(source)
    if root.is_dir():
        return [(file.relative_to(root).as_posix(), file) for file in files]
    return [("".join(file.suffixes), file) for file in files]


def _contents(files: list[tuple[str, Path]], known: dict[str, Any]) -> list[tuple[str, str]]:
    """The files' names and fingerprints; what is known is asked and told only where reading them all takes a while."""
    if sum(file.stat().st_size for _, file in files) < MANY_BYTES:
        known = {}
    return [(name, known_fingerprint(file, str(file.resolve()), known)) for name, file in files]
