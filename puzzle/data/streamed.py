"""Rows of whatever the `datasets` library can stream: a hub data set, a local one, files through one of its builders.

Reads from the host or the disk, row by row; writes nothing but that library's own cache. The library is an extra
(``pip install puzzle-nas[data]``) and imported when a configuration names a data set, not before. Pure: no torch.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puzzle.config import SourceConfig
from puzzle.types import ConfigError, CorruptFileError

EXTRA = "pip install 'puzzle-nas[data]'"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def rows(source: SourceConfig, start: int) -> Iterator[dict[str, Any]]:
    """The rows of ``source`` from the ``start``-th on. ConfigError if it cannot be opened, CorruptFileError if reading
    stops half-way: a damaged file, or a host that does not answer any more."""
    stream, index = _open(source).skip(start), start
    try:
        for row in stream:
            yield row
            index += 1
    except Exception as error:  # file systems, HTTP libraries, Arrow: all of it means that there is no next row
        raise CorruptFileError(
            f"dataset {source.label}: unreadable after {index} rows ({_reason(error)}); "
            "the same command continues from there"
        ) from None


def library(source: SourceConfig) -> Any:
    """The `datasets` module; ConfigError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"dataset {source.label}: needs the `datasets` library; {EXTRA}") from None
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it says, it also raises
    datasets.disable_progress_bars()
    return datasets


def _open(source: SourceConfig) -> Any:
    datasets = library(source)
    try:
        return datasets.load_dataset(
            source.dataset,
            source.name,
            split=source.split or "train",
            revision=source.revision,
            data_files=list(source.data_files) or None,
            streaming=True,
        )
    except Exception as error:  # as above; a wrong name, configuration or split, or a host out of reach
        damaged = type(error).__module__.startswith("pyarrow")
        kind = CorruptFileError if damaged else ConfigError
        raise kind(f"dataset {source.label}: cannot be opened ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def on_hub(source: SourceConfig) -> bool:
    """Whether the rows come from a repository that may change, rather than from files that are here."""
    if source.dataset is None or Path(source.dataset).exists():
        return False
    return "/" in source.dataset or not source.data_files  # else the name of a builder: parquet, json, csv, text


def is_pinned(source: SourceConfig) -> bool:
    return not on_hub(source) or _COMMIT.fullmatch(source.revision or "") is not None


def newest_commit(source: SourceConfig) -> str | None:
    """The commit that the source's revision (default: the main branch) stands at; None if its host cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(source.dataset), revision=source.revision, timeout=10).sha
    except Exception:  # unreachable or unknown; if the rows cannot be had either, opening says so
        return None


def local_files(source: SourceConfig) -> list[Path]:
    """The files on this disk that the rows come from."""
    if on_hub(source):
        return []
    folder = Path(source.dataset or "")
    if folder.is_dir():
        return sorted(file for file in folder.rglob("*") if file.is_file())
    found = {path for pattern in source.data_files for path in glob.glob(pattern, recursive=True)}
    return sorted(path for path in map(Path, found) if path.is_file())
