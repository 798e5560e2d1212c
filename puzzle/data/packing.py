"""Tokenised documents, packed end to end: mixed by weight when written, memory-mapped when read. Pure: no torch.

Reads the shards that tokenise.py wrote, one list of them per source; writes ``tokens.safetensors`` with, per split,

    SPLIT.ids (N,) int32        SPLIT.starts (D,) int64, where each of its documents begins
    SPLIT.counted (N,) bool     tokens that count in losses and metrics; only where not all do

The documents of a mixture lie in the order in which each source's share of the way is covered: the k-th stands where
``tokens before it / tokens to take`` says. So any stretch of the file, its tail too, holds the sources in their shares.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puzzle.checkpoint import check_safetensors
from puzzle.data.source import SPLITS
from puzzle.types import CorruptFileError

TOKENS_FILE = "tokens.safetensors"
HELD_OUT_WINDOWS, HELD_OUT_SHARE = 64, 20  # at most so many windows of `train`, and one in so many
DTYPES: Mapping[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "BOOL": np.dtype("?")}

Arrays = Mapping[str, np.ndarray]
Counts = Mapping[str, int]  # tokens by split
Documents = Any  # a numpy.recarray of DOCUMENT
DOCUMENT = np.dtype([*((name, "i8") for name in ("source", "shard", "first", "length", "text_bytes")), ("place", "f8")])


@dataclass(frozen=True)
class Packed:
    """One split's tokens (N,), where its D documents begin, and which tokens count (None: all)."""

    ids: np.ndarray
    starts: np.ndarray
    counted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


def num_held_out(num_train_tokens: int, sequence_tokens: int) -> int:
    """How many windows at the tail of ``train`` are kept for stopping early: 5 %, at most 64, one if there is any."""
    return min(HELD_OUT_WINDOWS, -(-(num_train_tokens // sequence_tokens) // HELD_OUT_SHARE))


def num_windows(num_tokens: Counts, split: str, sequence_tokens: int) -> int:
    """How many windows a split has to draw from: all of them but, in ``train``, those held out."""
    windows = num_tokens[split] // sequence_tokens
    return windows - num_held_out(num_tokens[split], sequence_tokens) if split == "train" else windows


# --- how much to take of each source ---------------------------------------------------------------------------------


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to ``weights`` that add up to ``total``."""
    bounds = np.rint(total * np.cumsum(weights) / np.sum(weights)).astype(np.int64)
    return [int(part) for part in np.diff(bounds, prepend=0)]


def quotas(wanted: Counts, weights: Sequence[float | None]) -> list[dict[str, int]]:
    """The tokens to take of each source where ``wanted`` says how many there shall be of each split."""
    parts = {split: apportioned(wanted[split], [weight or 1.0 for weight in weights]) for split in SPLITS}
    return [{split: parts[split][index] for split in SPLITS} for index in range(len(weights))]


def shares(available: Sequence[Counts], weights: Sequence[float | None]) -> list[dict[str, int]]:
    """The tokens to take of each source where nothing says how many: as many as the scarcest allows, or all."""
    taken: list[dict[str, int]] = [{} for _ in available]
    for split in SPLITS:
        there = [counts[split] for counts in available]
        given = [weight for weight in weights if weight is not None]
        scale = min((count / weight for count, weight in zip(there, given, strict=True)), default=0.0) if given else 0.0
        for index, count in enumerate(there):
            taken[index][split] = min(count, int(scale * given[index])) if given else count
    return taken


# --- writing ---------------------------------------------------------------------------------------------------------


def _stretches(order: Documents) -> Iterator[tuple[int, int, int, int]]:
    """(source, shard, first, stop) of neighbours that are neighbours in their shard too, as one."""
    if len(order) == 0:
        return
    breaks = (
        (np.diff(order.source) != 0)
        | (np.diff(order.shard) != 0)
        | (order.first[1:] != order.first[:-1] + order.length[:-1])
    )
    heads = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    tails = np.concatenate([heads[1:], [len(order)]]) - 1
    for head, tail in zip(order[heads], order[tails], strict=True):
        yield int(head.source), int(head.shard), int(head.first), int(tail.first + tail.length)


def _ordered(sources: Sequence[Sequence[Arrays]], split: str, taken: Sequence[Counts]) -> Documents:
    """A split's documents in the order in which they are packed, a row each: whence, how long, how many bytes."""
    columns: list[tuple[np.ndarray, ...]] = []
    for index, (shards, counts) in enumerate(zip(sources, taken, strict=True)):
        lengths = [np.asarray(shard[f"{split}.lengths"]) for shard in shards]
        length = np.concatenate([*lengths, np.empty(0, np.int64)])
        before = np.cumsum(length) - length
        kept = before < counts[split]
        shard = np.repeat(np.arange(len(shards)), [len(one) for one in lengths])
        first = np.concatenate([*(np.cumsum(one) - one for one in lengths), np.empty(0, np.int64)])
        cut = np.minimum(length, counts[split] - before)
        text = np.concatenate([*(np.asarray(one[f"{split}.bytes"]) for one in shards), np.empty(0, np.int64)])
        bytes_taken = np.where(cut == length, text, text * cut // np.maximum(length, 1))
        source, place = np.full(len(length), index), before / max(1, counts[split])
        columns.append(tuple(column[kept] for column in (source, shard, first, cut, bytes_taken, place)))
    merged = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    rows = np.rec.fromarrays(merged, dtype=DOCUMENT)
    return rows[np.lexsort((rows.source, rows.place))]


def pack(sources: Sequence[Sequence[Arrays]], taken: Sequence[Counts], folder: Path) -> dict[str, Any]:
    """Writes ``folder/tokens.safetensors`` from the sources' shards; returns what there is to know about it."""
    orders = {split: _ordered(sources, split, taken) for split in SPLITS}
    num_tokens = {split: int(order.length.sum()) for split, order in orders.items()}
    num_counted = num_tokens
    columns = [  # the widest first, so that each begins at a multiple of its width
        _Column(f"{split}.starts", "I64", len(order.length), [np.cumsum(order.length) - order.length])
        for split, order in orders.items()
    ]
    for split, order in orders.items():
        columns.append(_Column(f"{split}.ids", "I32", num_tokens[split], _ids(sources, split, order)))
    if any(name.endswith(".counted") for shards in sources for shard in shards for name in shard):
        num_counted = {
            split: sum(int(part.sum()) for part in _counted(sources, split, order)) for split, order in orders.items()
        }
        for split, order in orders.items():
            columns.append(_Column(f"{split}.counted", "BOOL", num_tokens[split], _counted(sources, split, order)))
    write_safetensors(folder / TOKENS_FILE, columns)
    return {
        "num_tokens": num_tokens,
        "num_documents": {split: len(order.length) for split, order in orders.items()},
        "bytes_per_token": {
            split: int(order.text_bytes.sum()) / max(1, num_counted[split]) for split, order in orders.items()
        },
    }


def _ids(sources: Sequence[Sequence[Arrays]], split: str, order: Documents) -> Iterator[np.ndarray]:
    for source, shard, first, stop in _stretches(order):
        yield sources[source][shard][f"{split}.ids"][first:stop]


def _counted(sources: Sequence[Sequence[Arrays]], split: str, order: Documents) -> Iterator[np.ndarray]:
    for source, shard, first, stop in _stretches(order):
        mask = sources[source][shard].get(f"{split}.counted")
        yield mask[first:stop] if mask is not None else np.ones(stop - first, bool)


@dataclass(frozen=True)
class _Column:
    """A one-dimensional tensor, as the parts it is written from."""

    name: str
    dtype: str
    length: int
    parts: Iterable[np.ndarray]


def write_safetensors(path: Path, columns: Sequence[_Column]) -> None:
    """Writes the columns one after the other without ever holding one of them whole."""
    header: dict[str, Any] = {}
    end = 0
    for column in columns:
        start, end = end, end + column.length * DTYPES[column.dtype].itemsize
        header[column.name] = {"dtype": column.dtype, "shape": [column.length], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns:
            for part in column.parts:
                file.write(np.ascontiguousarray(part, DTYPES[column.dtype]).data)
        assert file.tell() == 8 + len(text) + end


# --- reading ---------------------------------------------------------------------------------------------------------


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The one-dimensional tensors of a safetensors file, memory-mapped: they take no memory until they are read."""
    header = check_safetensors(path)
    with open(path, "rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
    found: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, (start, stop) = DTYPES[entry["dtype"]], entry["data_offsets"]
            found[name] = (
                np.memmap(path, dtype, "r", data + start, ((stop - start) // dtype.itemsize,))
                if stop > start
                else np.empty(0, dtype)
            )
    return found


def read_packed(folder: Path) -> dict[str, Packed]:
    """Every split that :func:`pack` wrote into ``folder``."""
    path = folder / TOKENS_FILE
    try:
        arrays = map_tensors(path)
        return {
            split: Packed(arrays[f"{split}.ids"], arrays[f"{split}.starts"], arrays.get(f"{split}.counted"))
            for split in SPLITS
        }
    except (KeyError, OSError) as error:
        raise CorruptFileError(f"{path}: unreadable ({error}); delete {folder} and run again") from None
