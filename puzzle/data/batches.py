"""Batches of packed tokens, as a pure function of (data, split, seed, step).

Reads the unit ``data/`` (packing.py) through memory maps; cuts it into windows of T tokens as they are asked for. The
last windows of ``train`` are held out: nothing but :meth:`TokenData.held_out` ever hands them out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from puzzle.artifacts import Unit
from puzzle.config import DataConfig
from puzzle.data.packing import Packed, num_held_out, num_windows, read_packed
from puzzle.data.source import SPLITS
from puzzle.types import ConfigError


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids (B, T) int64 and what belongs to them.

    ``counted`` (B, T) bool: the tokens that count, as targets, in losses and metrics; None: all. A row may hold none.
    ``documents`` (B, T) int32: the number of the document a token belongs to, from 0 in each row; None: attention may
    cross from one to the next.
    """

    ids: Tensor
    counted: Tensor | None = None
    documents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda part: part.to(device))

    def split(self, num_sequences: int) -> list[Batch]:
        """In pieces of at most so many sequences."""
        return [self.rows(slice(first, first + num_sequences)) for first in range(0, len(self), num_sequences)]

    def rows(self, rows: slice) -> Batch:
        """Some of its sequences."""
        return self._each(lambda part: part[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        counted, documents = (None if part is None else change(part) for part in (self.counted, self.documents))
        return Batch(change(self.ids), counted, documents)


@dataclass(frozen=True)
class TokenData:
    """Packed tokens by split, cut into windows of ``sequence_tokens``; ``bytes_per_token`` is of each split's text, by
    the tokens that count. ``within_documents``: batches say which document each token belongs to."""

    splits: Mapping[str, Packed]
    bytes_per_token: Mapping[str, float]
    sequence_tokens: int
    within_documents: bool = False

    def num_sequences(self, split: str) -> int:
        """How many windows there are to draw from; of ``train`` without those held out."""
        return num_windows({name: len(packed) for name, packed in self.splits.items()}, split, self.sequence_tokens)

    @property
    def num_held_out(self) -> int:
        return num_held_out(len(self.splits["train"]), self.sequence_tokens)

    def sequences(self, split: str, count: int, seed: int) -> Batch:
        """The first ``count`` windows of the split in an order shuffled by ``seed``."""
        available = self.num_sequences(split)
        self._check(split, count, available, "windows")
        order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(available)[:count]
        return self._windows(split, order * self.sequence_tokens)

    def held_out(self, count: int) -> Batch:
        """The first ``count`` of the windows of ``train`` that neither ``batch`` nor ``sequences`` ever draws."""
        self._check("train", count, self.num_held_out, "held-out windows")
        return self._windows("train", (self.num_sequences("train") + np.arange(count)) * self.sequence_tokens)

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Windows of ``train`` at ``step``: each epoch has its own order and its own offset of the windows."""
        per_epoch = self.num_sequences("train") - 1
        if per_epoch < 1:
            raise ConfigError(
                f"train holds {len(self.splits['train'])} tokens: too few for windows of {self.sequence_tokens};"
                " give more text or lower data.sequence_tokens"
            )
        starts = []
        for index in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(index, per_epoch)
            offset, order = _epoch(seed, epoch, per_epoch, self.sequence_tokens)
            starts.append(offset + order[place] * self.sequence_tokens)
        return self._windows("train", np.array(starts))

    def _check(self, split: str, count: int, available: int, what: str) -> None:
        if count > available:
            raise ConfigError(
                f"split {split!r} holds {available} {what} of {self.sequence_tokens} tokens, {count} were asked for; "
                "give more text or ask for fewer sequences"
            )

    def _windows(self, split: str, starts: np.ndarray) -> Batch:
        packed = self.splits[split]
        places = starts[:, None] + np.arange(self.sequence_tokens)  # (B, T)
        ids = torch.from_numpy(np.asarray(packed.ids[places], np.int64))
        counted = torch.from_numpy(np.asarray(packed.counted[places])) if packed.counted is not None else None
        if not self.within_documents:
            return Batch(ids, counted)
        documents = np.searchsorted(packed.starts, places, side="right")
        return Batch(ids, counted, torch.from_numpy((documents - documents[:, :1]).astype(np.int32)))


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, per_epoch: int, sequence_tokens: int) -> tuple[int, np.ndarray]:
    """The offset of an epoch's windows, and their order."""
    rng = np.random.default_rng([seed, len(SPLITS), epoch])
    return int(rng.integers(sequence_tokens)), rng.permutation(per_epoch)


def read_tokens(unit: Unit, settings: DataConfig) -> TokenData:
    """The tokens of the run's data, cut as the settings say."""
    bytes_per_token = unit.read(dict[str, float], "bytes_per_token")
    return TokenData(read_packed(unit.path), bytes_per_token, settings.sequence_tokens, settings.within_documents)
