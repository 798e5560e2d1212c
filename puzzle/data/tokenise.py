"""Documents to tokens, shard by shard, so that a killed run goes on where it was.

Reads documents (data_source.py); publishes ``shards/SOURCE/NUMBER``, each a unit that says which of the source's
records it covers. packing.py makes the data out of them, and then they are gone. What the data is in the end does not
depend on where one shard stops and the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from puzzle import artifacts
from puzzle.config import DataConfig, SourceConfig
from puzzle.data.encode import Encoded, Encoder, check_template
from puzzle.data.packing import Counts, map_tensors, pack, quotas, shares
from puzzle.data.source import SPLITS, Document, check_source, documents
from puzzle.data.streamed import is_pinned
from puzzle.progress import Progress, console
from puzzle.types import ConfigError

SHARD_TOKENS = 4_000_000
BATCH_CHARACTERS = 1_000_000  # tokenised in one call
_FILE = "tokens.safetensors"


@dataclass
class _Shard:
    """What is collected until it is published."""

    start: int
    stop: int
    ended: bool = False
    encoded: dict[str, list[Encoded]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def add(self, split: str, one: Encoded) -> None:
        self.encoded[split].append(one)
        self.counts[split] += len(one.ids)

    def write(self, aside: Path) -> Mapping[str, Any]:
        arrays = {}
        for split, all_of_it in self.encoded.items():
            arrays[f"{split}.ids"] = np.concatenate([*(one.ids for one in all_of_it), np.empty(0, np.int32)])
            arrays[f"{split}.lengths"] = np.array([len(one.ids) for one in all_of_it], np.int64)
            arrays[f"{split}.bytes"] = np.array([one.num_bytes for one in all_of_it], np.int64)
            if masks := [one.counted for one in all_of_it if one.counted is not None]:
                arrays[f"{split}.counted"] = np.concatenate(masks)
        save_file(arrays, aside / _FILE)
        return {"start": self.start, "stop": self.stop, "ended": self.ended, "counts": self.counts}


def tokenise(
    source: SourceConfig,
    encoder: Encoder,
    quota: Counts | None,
    folder: Path,
    inputs: Mapping[str, str],
    report: Callable[[int], None],
) -> None:
    """Publishes the source's shards in ``folder``, but those that are there already.

    Ends when every split has its ``quota`` of tokens, or with the source. ``report`` hears of new tokens. ConfigError
    if the source ends before.
    """
    done = finished(folder, inputs)
    counts = {split: sum(unit.read(int, "counts", split) for unit in done) for split in SPLITS}
    start, ended = (done[-1].read(int, "stop"), done[-1].read(bool, "ended")) if done else (0, False)
    report(sum(counts.values()))
    stream = documents(source, start)
    number = len(done)
    while not ended and not _enough(counts, quota):
        shard = _next_shard(stream, start, encoder, counts, quota, report)
        artifacts.publish_folder(folder / f"{number:05d}", inputs, shard.write)
        counts = {split: counts[split] + shard.counts[split] for split in SPLITS}
        start, ended, number = shard.stop, shard.ended, number + 1
    if quota is not None and not _enough(counts, quota):
        split = next(split for split in SPLITS if counts[split] < quota[split])
        raise ConfigError(
            f"{source.label} ran out: {counts[split]:,} tokens for the split {split!r}, where {quota[split]:,} were "
            "asked of it; lower data.tokens or its weight, or give more text"
        )


def tokenise_all(
    settings: DataConfig,
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    folder: Path,
    inputs: Mapping[str, str],
    progress: Progress,
) -> None:
    """Every source's shards, each source's in a folder of its own."""
    for source in sources:  # what can be refused is refused before anything takes long
        check_source(source)
        if source.messages is not None:
            check_template(encoder.tokenizer, source.label)
    wanted = _quotas(settings)
    total = sum(sum(quota.values()) for quota in wanted or [])
    progress.total(max(1, total), 0)
    for index, source in enumerate(sources):
        if not is_pinned(source):
            advice = "read at an unknown commit; name one as its revision to repeat this exactly"
            console.print(f"{source.label}: {advice}", markup=False, soft_wrap=True)
        seen = 0

        def report(num_tokens: int, label: str = source.label) -> None:
            nonlocal seen
            seen += num_tokens
            progress.fraction(num_tokens if total else 0, f"{label}: {seen:,} tokens")

        quota = wanted[index] if wanted is not None else None
        tokenise(source, encoder, quota, folder / f"{index:02d}", inputs, report)


def pack_all(settings: DataConfig, folder: Path, inputs: Mapping[str, str], aside: Path) -> dict[str, Any]:
    """Packs what :func:`tokenise_all` left in ``folder``; the unit's payload. ConfigError for an empty split."""
    labels = [source.label for source in settings.all_sources]
    folders = [folder / f"{index:02d}" for index in range(len(labels))]
    shards = [[map_tensors(unit.path / _FILE) for unit in finished(one, inputs)] for one in folders]
    available = [{split: sum(len(one[f"{split}.ids"]) for one in some) for split in SPLITS} for some in shards]
    weights = [source.weight for source in settings.all_sources]
    for split in SPLITS:
        empty = [label for label, counts in zip(labels, available, strict=True) if not counts[split]]
        if empty and (weights[0] is not None or len(empty) == len(labels)):
            raise ConfigError(
                f"{', '.join(empty)}: too little text: no document falls into the split {split!r}; give more documents"
            )
    taken = _quotas(settings) or shares(available, weights)
    payload = pack(shards, taken, aside)
    return {**payload, "sources": [{"name": label, "num_tokens": n} for label, n in zip(labels, taken, strict=True)]}


def _quotas(settings: DataConfig) -> list[dict[str, int]] | None:
    if settings.tokens is None:
        return None
    return quotas(settings.tokens.model_dump(), [source.weight for source in settings.all_sources])


def finished(folder: Path, inputs: Mapping[str, str]) -> list[artifacts.Unit]:
    """The source's shards so far, in order; those made from other inputs, or left behind a gap, are swept away."""
    found: list[artifacts.Unit] = []
    for path in sorted(folder.glob("[0-9]*")):
        unit = artifacts.read_unit(path)
        expected = found[-1].read(int, "stop") if found else 0
        if unit.inputs == dict(inputs) and unit.read(int, "start") == expected:
            found.append(unit)
        else:
            artifacts.remove(path)
    return found


def _enough(counts: Counts, quota: Counts | None) -> bool:
    return quota is not None and all(counts[split] >= quota[split] for split in SPLITS)


def _next_shard(
    stream: Iterator[Document],
    start: int,
    encoder: Encoder,
    counts: Counts,
    quota: Counts | None,
    report: Callable[[int], None],
) -> _Shard:
    shard, total = _Shard(start, start), dict(counts)
    for batch, num_records in _batches(stream, lambda split: quota is None or total[split] < quota[split]):
        encoded = encoder.encode(batch)
        for document, one in zip(batch, encoded, strict=True):
            shard.add(document.split, one)
            total[document.split] += len(one.ids)
        shard.stop += num_records
        report(sum(len(one.ids) for one in encoded))
        if sum(shard.counts.values()) >= SHARD_TOKENS or _enough(total, quota):
            return shard
    shard.ended = True
    return shard


def _batches(stream: Iterator[Document], wants: Callable[[str], bool]) -> Iterator[tuple[list[Document], int]]:
    """What is wanted of the stream, and of how many records; blank texts are wanted by nobody."""
    batch: list[Document] = []
    num_records = size = 0
    for document in stream:
        num_records += 1
        content = document.content
        text = content if isinstance(content, str) else "".join(turn["content"] for turn in content)
        if wants(document.split) and text.strip():
            batch.append(document)
            size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch, num_records
            batch, num_records, size = [], 0, 0
    yield batch, num_records
