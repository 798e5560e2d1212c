"""The stages of a pruning: what layers, heads and channels do, and the student made of those that do most."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from puzzle import artifacts, build
from puzzle.blocks.importance import LayerImportance, Scores, layer_importance
from puzzle.blocks.moments import NotFiniteError, token_weights
from puzzle.blocks.prune import Kept, choose_heads, most_important, pruned_ends, pruned_layer, student_config
from puzzle.blocks.refit import SideBySide
from puzzle.blocks.stream import Stream
from puzzle.config import ImportanceConfig
from puzzle.data.batches import Batch
from puzzle.modeling import family_of
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.pruning import num_dropped
from puzzle.ranks import AddUp, Ranks, alone, shares, team_sum
from puzzle.run import Run
from puzzle.scoring.exact import Change
from puzzle.stages.common import BATCH_SEQUENCES, num_batches, sequences_of, stored_dtype, streamed_teacher
from puzzle.stages.score import ScoreJob
from puzzle.teacher import Shards, read_tensors
from puzzle.types import ConfigError, CorruptFileError
from puzzle.variants import run_item

TENSORS = "importance.safetensors"


@dataclass(frozen=True)
class _Portion:
    """Those of ``count`` pieces of work that are this rank's, one after the other, and sums over all who have some."""

    own: range
    count: int
    add_up: AddUp = alone

    @classmethod
    def of(cls, count: int) -> _Portion:
        """To be asked for by all ranks in the same order."""
        ranks = Ranks.current()
        costs = {str(piece): 1.0 for piece in range(count)}
        own = [int(piece) for piece in shares(costs, ranks.count, 1)[ranks.rank].pieces]
        add_up = team_sum(range(min(count, ranks.count))) if ranks.count > 1 else alone
        return cls(range(own[0], own[-1] + 1) if own else range(0), count, add_up)

    def batches(self, run: Run) -> list[Batch]:
        """Of calibration tokens, where the pieces are batches of them."""
        first, stop = (place * BATCH_SEQUENCES for place in (self.own.start, self.own.stop))
        return sequences_of(run, "train", min(stop, run.config.init.sequences), first)

    def all_rows(self, rows: Tensor, first: int, count: int) -> Tensor:
        """(count, ...) of all ranks from one's own, which begin at ``first``; exact, for the others add zeros."""
        every = rows.new_zeros(count, *rows.shape[1:])
        every[first : first + len(rows)] = rows
        self.add_up([every])
        return every


def make_importance(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Ranks share the sequences, and of what leaving layers out costs the layers."""
    with Ranks.current().naming_the_dead(run.folder, "importance", only_known=True):
        for unit in missing:
            if unit.path == run.importance:
                _publish_importance(run, unit, progress)
            else:
                asking = next(one for one in run.contenders if one.drops == unit.path)
                _publish_drops(asking, unit, progress)
            progress.done(unit.path.name)


def _publish_importance(run: Run, unit: Planned, progress: Progress) -> None:
    """Of every layer on the calibration tokens that ``init`` takes, in one pass of the teacher."""
    how, count = run.config.prune.importance if run.config.prune else ImportanceConfig(), run.config.init.sequences
    portion = _Portion.of(num_batches(count))
    if not portion.own:
        return
    teacher = streamed_teacher(run, torch.float32)
    stream = Stream.of(teacher, portion.batches(run))
    all_rows = functools.partial(portion.all_rows, first=portion.own.start * BATCH_SEQUENCES, count=count)
    found: list[LayerImportance] = []
    for index in range(teacher.num_layers):
        layer = teacher.layer(index)
        found.append(layer_importance(layer, stream.passes(layer), how, all_rows))
        stream.advance(layer)
        progress.fraction(1 / teacher.num_layers)
    last = Scores(how, all_rows)
    for index in range(stream.num_batches):
        hidden = stream.hidden(index)
        last.add(teacher.top.model.norm(hidden.float()).abs(), token_weights(hidden))
    tensors = {"hidden": torch.stack([last.total(), *(one.hidden for one in found)]).sum(0)}
    for index, one in enumerate(found):
        tensors[f"{index}.heads"] = one.heads
        if one.channels is not None:
            tensors[f"{index}.channels"] = one.channels

    def write(aside: Path) -> Mapping[str, Any]:
        save_file(tensors, aside / TENSORS)
        return {"importance": [one.block for one in found]}

    if Ranks.current().first:
        artifacts.publish_folder(unit.path, unit.inputs, write)


def _publish_drops(run: Run, unit: Planned, progress: Progress) -> None:
    """What leaving out so many consecutive layers costs, by metric and by the first of them."""
    together = num_dropped(run.pruning, run.shape) if run.pruning.layers_by == "contiguous" else 1
    portion = _Portion.of(run.shape.num_layers - together + 1)
    if not portion.own:
        return
    own: dict[str, list[float]] = {}
    with ScoreJob(run) as job:
        for first in portion.own:
            change = Change(str(first), (run_item(first, first + together - 1),))
            ((_, values),) = job.exact([change])
            for metric, column in values.items():
                own.setdefault(metric, []).append(column.mean().item())
            progress.fraction(1 / len(portion.own))
    scores: dict[str, dict[str, float]] = {}
    for metric, means in own.items():
        every = portion.all_rows(torch.tensor(means, dtype=torch.float64), portion.own.start, portion.count)
        scores[metric] = {str(first): mean for first, mean in enumerate(every.tolist())}
    if (metric := run.pruning.layers_metric) not in scores:
        raise ConfigError(f"prune.layers_metric: no score is called {metric!r}; there are {', '.join(scores)}")
    if Ranks.current().first:
        artifacts.publish_json(unit.path, unit.inputs, {"scores": scores})


def make_prune(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Ranks share the sequences; each makes the student, and the first one writes it."""
    (unit,) = missing
    with Ranks.current().naming_the_dead(run.folder, "prune", only_known=True):
        portion = _Portion.of(num_batches(run.config.init.sequences) if run.config.init.start == "best" else 1)
        if portion.own:
            publish_pruned(run, unit.inputs, unit.path, progress, portion)
    progress.done(unit.path.name)


def publish_pruned(
    run: Run, inputs: Mapping[str, str], path: Path, progress: Progress | None = None, portion: _Portion | None = None
) -> None:
    """The student as it is before distillation, as a unit at ``path``: made by this rank alone, or by all that have a
    ``portion``, of whom the first writes it."""
    count = num_batches(run.config.init.sequences)
    portion = portion or _Portion(range(count), count)
    job = _Pruning(run, portion)
    state: dict[str, Tensor] = {}
    try:
        for index in range(run.shape.num_layers):
            for name, tensor in job.layer(index).items():
                state[name] = tensor.to("cpu", stored_dtype(run))
            if progress is not None:
                progress.fraction(1 / run.shape.num_layers)
        state |= {name: tensor.to("cpu", stored_dtype(run)) for name, tensor in job.ends().items()}
    except NotFiniteError as error:
        raise CorruptFileError(f"{run.teacher}: {error}; its weights are damaged: make or fetch it again") from None

    def write(aside: Path) -> Mapping[str, Any]:
        build.write_state(state, job.config, aside, stored_dtype(run))
        return {"layers": list(run.kept_layers)}

    if portion.own.start == 0:
        artifacts.publish_folder(path, inputs, write)


class _Pruning:
    """A student in the making, from one walk through the teacher; the paper's start sees no tokens."""

    def __init__(self, run: Run, portion: _Portion) -> None:
        self._run = run
        self._teacher = streamed_teacher(run, torch.float32)
        self._scores = read_tensors(run.importance / TENSORS)
        self._hidden = most_important(self._scores["hidden"], run.student_shape.hidden_size)
        self._both: SideBySide | None = None
        if run.config.init.start == "best":
            self._both = SideBySide(self._teacher, portion.batches(run), self._hidden, portion.add_up)
        self.config = student_config(self._teacher.config, run.student_shape, run.kept_layers)

    def layer(self, index: int) -> dict[str, Tensor]:
        """What becomes of one layer of the teacher, by names within the model; to be called for one after the other."""
        teacher, stays = self._teacher.layer(index), index in self._run.kept_layers
        narrow = self._run.student_shape.intermediate_size < self._run.shape.intermediate_size
        order = None if self._both is None else self._both.enter(teacher, with_order=narrow and stays)
        if not stays:
            return {}
        place, scores = self._run.kept_layers.index(index), self._scores[f"{index}.heads"]
        kept = self._kept(index, order)
        ranked = scores.argsort(descending=True) if self._both is None else None
        layer = pruned_layer(teacher, self.config, place, kept, ranked)
        if self._both is not None:
            self._both.refit(layer, teacher, kept)
        return {f"model.layers.{place}.{name}": tensor for name, tensor in layer.state_dict().items()}

    def _kept(self, index: int, order: Tensor | None) -> Kept:
        """``order``: the FFN's channels, most useful first; None: by their importance."""
        run, width = self._run, self._run.student_shape.intermediate_size
        kept = choose_heads(self._scores[f"{index}.heads"], run.shape, run.student_shape)
        if order is not None:
            channels: Tensor | None = order[:width].sort().values
        elif f"{index}.channels" in self._scores:
            channels = most_important(self._scores[f"{index}.channels"], width)
        else:
            channels = None
        return replace(kept, hidden=self._hidden, channels=channels)

    def ends(self) -> dict[str, Tensor]:
        """Embedding, last norm and head; to be called behind all layers."""
        shards, cpu = Shards(self._run.teacher, self._teacher.config), torch.device("cpu")
        tied = self.config.tie_word_embeddings
        prefixes = ("model.embed_tokens.", "model.norm.", *(() if tied else ("lm_head.",)))
        read = {name: one for prefix in prefixes for name, one in shards.read(prefix, cpu, torch.float32).items()}
        ends = pruned_ends(read, self._teacher.config, self.config, Kept(self._hidden))
        if self._both is None:
            return ends
        norm = family_of(self.config).norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(ends["model.norm.weight"].clone(), requires_grad=False)
        return self._both.refit_ends(ends, norm.to(self._teacher.device))
