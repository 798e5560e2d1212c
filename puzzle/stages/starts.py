"""The stages before training: tokens and starting points."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from puzzle import artifacts
from puzzle.blocks.moments import NotFiniteError
from puzzle.blocks.starts import Start, best_starts, nested_start, paper_nested_start, paper_starts
from puzzle.blocks.stream import Stream
from puzzle.data import tokenise
from puzzle.data.encode import Encoder
from puzzle.data.inputs import pinned_sources
from puzzle.memory_plan import Batches, check_init
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stages.common import (
    BATCH_SEQUENCES,
    HELD_OUT_SEQUENCES,
    held_out_of,
    machine_of,
    sequences_of,
    streamed_teacher,
    write_unit,
)
from puzzle.teacher import LayerPass, load_config, load_tokenizer
from puzzle.types import CorruptFileError, Item, Spec
from puzzle.variants import WEIGHTLESS


def make_data(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    load_config(run.teacher)  # what transformers refuses is refused now, not after the first long stage
    encoder = Encoder(load_tokenizer(run.teacher), run.shape.vocab_size)
    settings, shards = run.config.data, run.folder / "shards"
    tokenise.tokenise_all(settings, pinned_sources(settings, run.folder), encoder, shards, unit.inputs, progress)
    pack = functools.partial(tokenise.pack_all, settings, shards, unit.inputs)
    artifacts.publish_folder(unit.path, unit.inputs, pack)
    artifacts.remove(shards)
    progress.done(unit.path.name)


def make_init(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    wanted = {unit.path.name: unit for unit in missing}
    if run.config.init.start == "best":
        _check_memory(run, list(wanted))
    teacher = streamed_teacher(run, torch.float32)
    calibration = Stream.of(teacher, sequences_of(run, "train", run.config.init.sequences))
    held_out = Stream.of(teacher, held_out_of(run))
    for index in range(run.shape.num_layers):
        here = {unit: items for unit, items in run.units.items() if items[0].layers[0] == index}
        units = {unit: items for unit, items in here.items() if unit in wanted}
        layer = teacher.layer(index)
        if units:
            for unit, start in _Layer(run, layer, calibration, held_out).starts(units).items():
                losses = {name: loss if math.isfinite(loss) else None for name, loss in start.losses.items()}
                payload = {"start": start.name, "losses": losses}
                write = functools.partial(write_unit, run, start.weights, payload)
                artifacts.publish_folder(wanted[unit].path, wanted[unit].inputs, write)
                progress.done(unit)
        for stream in (calibration, held_out):
            stream.advance(layer)


def _check_memory(run: Run, units: Sequence[str]) -> None:
    """ConfigError where the starting points of a layer do not fit in the budget."""
    specs: dict[int, set[Spec]] = {}
    for item in (item for unit in units for item in run.units[unit]):
        specs.setdefault(item.layers[0], set()).update(spec for spec in item.specs if spec.kind not in WEIGHTLESS)
    num_batches = math.ceil((run.config.init.sequences + HELD_OUT_SEQUENCES) / BATCH_SEQUENCES)
    batches = Batches(num_batches, BATCH_SEQUENCES * run.config.data.sequence_tokens, torch.float32.itemsize)
    check_init(run.shape, specs, batches, machine_of(run))


@dataclass(frozen=True)
class _Layer:
    """One layer of the teacher, and what enters it."""

    run: Run
    layer: PuzzleDecoderLayer
    calibration: Stream
    held_out: Stream

    def starts(self, units: Mapping[str, Sequence[Item]]) -> dict[str, Start]:
        """The starting point of each unit; CorruptFileError where the teacher does not compute numbers."""
        try:
            return self._starts(units)
        except NotFiniteError as error:
            raise CorruptFileError(
                f"{self.run.teacher}, layer {self.layer.layer_idx}: {error}, so no starting point follows from them; "
                "its weights are damaged or far too large: make or fetch it again"
            ) from None

    def _starts(self, units: Mapping[str, Sequence[Item]]) -> dict[str, Start]:
        """A pair's is that of both its parts."""
        nested = {unit: items for unit, items in units.items() if len(items) > 1}
        single = {unit: items[0] for unit, items in units.items() if len(items) == 1}
        specs = (spec for item in single.values() for spec in item.specs)
        found = self._best(list(dict.fromkeys(spec for spec in specs if spec.kind not in WEIGHTLESS)))
        starts = {unit: [found[spec] for spec in item.specs if spec in found] for unit, item in single.items()}
        joined = {unit: _joined(of_parts) for unit, of_parts in starts.items()}
        return joined | {unit: self._nested(items) for unit, items in nested.items()}

    def _best(self, specs: Sequence[Spec]) -> dict[Spec, Start]:
        config, layer = self.run.config, self.layer
        loss = (config.distill.loss_at, config.distill.loss)
        calibration, held_out = _Passes(self.calibration, layer), _Passes(self.held_out, layer)
        if config.init.start == "paper":
            return dict(paper_starts(layer, specs, calibration))
        return dict(best_starts(layer, specs, calibration, held_out, loss)) if specs else {}

    def _nested(self, items: Sequence[Item]) -> Start:
        width = max(getattr(item.specs[0], "intermediate_size", 0) for item in items)
        calibration = _Passes(self.calibration, self.layer)
        if self.run.config.init.start == "paper":
            return Start(paper_nested_start(self.layer, width, calibration), "paper", {})
        return Start(nested_start(self.layer, width, calibration), "sorted", {})


def _joined(starts: Sequence[Start]) -> Start:
    """The weights of one part, or of both."""
    weights = {name: tensor for start in starts for name, tensor in start.weights.items()}
    losses = starts[0].losses if len(starts) == 1 else {}
    return Start(weights, "+".join(start.name for start in starts), losses)


@dataclass(frozen=True)
class _Passes:
    """A layer's passes over a stream, computed anew each time they are iterated."""

    stream: Stream
    layer: PuzzleDecoderLayer

    def __iter__(self) -> Iterator[LayerPass]:
        return self.stream.passes(self.layer)
