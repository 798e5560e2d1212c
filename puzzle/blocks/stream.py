"""The residual stream of a fixed sequence of batches, moving through a teacher that need not fit in memory.

Reads a :class:`~puzzle.teacher.Teacher` layer by layer; holds what enters the layer it stands at. Three stores, with
equal results: ``memory``; ``disk``, one file of ``batches * B * T * D`` values; ``recompute``, from the ids again each
time, several batches together so that each layer read serves them all. Between two layers the stream is rounded to the
teacher's dtype, whoever computes it and however often it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from puzzle.data.batches import Batch
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import Context, LayerPass, Teacher, run_layer


class Store(Protocol):
    """Where one tensor per batch is kept; none is larger than the first, and each batch's are of one size."""

    def write(self, index: int, hidden: Tensor) -> None: ...

    def read(self, index: int) -> Tensor: ...


class InMemory:
    """In the host's memory; on a CPU without a copy."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def write(self, index: int, hidden: Tensor) -> None:
        self._rows[index] = hidden.cpu()

    def read(self, index: int) -> Tensor:
        return self._rows[index]


class OnDisk:
    """In one file, read and written a batch at a time; whoever named it deletes it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self._path = path
        self._like: dict[int, Tensor] = {}
        self._stride = 0

    def write(self, index: int, hidden: Tensor) -> None:
        self._like[index] = torch.empty_like(hidden, device="meta")
        data = _bytes_of(hidden.cpu().contiguous())
        self._stride = self._stride or len(data)
        assert len(data) <= self._stride
        try:
            with open(self._path, "r+b") as file:
                file.seek(index * self._stride)
                file.write(data)
        except OSError as error:
            error.filename = str(self._path)  # a write that fails names no file
            raise

    def read(self, index: int) -> Tensor:
        hidden = torch.empty(self._like[index].shape, dtype=self._like[index].dtype)
        data = _bytes_of(hidden)
        with open(self._path, "rb") as file:
            file.seek(index * self._stride)
            count = file.readinto(data)
        assert count == len(data), "the file ended early"
        return hidden


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


@dataclass
class Stream:
    """``batch(i)`` gives batch ``i`` of ``num_batches``; ``depth`` is the layer whose input :meth:`hidden` gives.

    ``dtype``: what the stream is rounded to between two layers, by default the teacher's.
    """

    teacher: Teacher
    batch: Callable[[int], Batch]
    num_batches: int
    store: Store | None  # None: recompute
    chunk: int = 1  # batches recomputed together
    dtype: torch.dtype | None = None
    depth: int = 0
    _recomputed: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, teacher: Teacher, batches: Sequence[Batch], dtype: torch.dtype | None = None, store: Store | None = None
    ) -> Stream:
        """Over a few batches; in memory where no ``store`` is given."""
        return cls(teacher, batches.__getitem__, len(batches), store or InMemory(), dtype=dtype)

    def context(self, index: int) -> Context:
        """What the layers need beside the residual stream of batch ``index``."""
        return self.teacher.context(self.batch(index))

    def hidden(self, index: int) -> Tensor:
        """The residual stream (B, T, D) of batch ``index`` at the input of layer ``depth``, on the teacher's device."""
        if self.depth == 0:
            return self.teacher.embed(self.batch(index))
        if self.store is not None:
            return self.store.read(index).to(self.teacher.device)
        if index not in self._recomputed:
            self._recompute(index)
        return self._recomputed[index].to(self.teacher.device)

    @torch.no_grad()
    def _recompute(self, first: int) -> None:
        indices = range(first, min(first + self.chunk, self.num_batches))
        self._recomputed = {index: self.teacher.embed(self.batch(index)).cpu() for index in indices}
        for depth in range(self.depth):
            layer = self.teacher.layer(depth)
            for index in indices:
                hidden = self._recomputed[index].to(self.teacher.device)
                self._recomputed[index] = self._next(layer, hidden, self.context(index)).cpu()

    @torch.no_grad()
    def at(self, layer: PuzzleDecoderLayer, index: int) -> LayerPass:
        """What layer ``depth`` makes of batch ``index``."""
        with self.teacher.autocast():
            return run_layer(layer, self.hidden(index), self.context(index))

    def passes(self, layer: PuzzleDecoderLayer) -> Iterator[LayerPass]:
        """What layer ``depth`` makes of every batch, one at a time."""
        return (self.at(layer, index) for index in range(self.num_batches))

    @torch.no_grad()
    def advance(self, layer: PuzzleDecoderLayer) -> None:
        """Moves on to the input of the layer after ``layer``, which is the one it stands at."""
        assert layer.layer_idx == self.depth
        if self.store is not None:
            for index in range(self.num_batches):
                self.store.write(index, self._next(layer, self.hidden(index), self.context(index)))
        self._recomputed = {}
        self.depth += 1

    def _next(self, layer: PuzzleDecoderLayer, hidden: Tensor, context: Context) -> Tensor:
        with self.teacher.autocast():
            return next_hidden(run_layer(layer, hidden, context), self.dtype or self.teacher.dtype)


def next_hidden(one: LayerPass, dtype: torch.dtype) -> Tensor:
    """What the next layer is given."""
    return one.after.to(dtype)
