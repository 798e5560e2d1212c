"""The stages of a pruning: what layers, heads and channels do, and the student made of those that do most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from puzzle.modeling import family_of
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.pruning import num_dropped
from puzzle.run import Run
from puzzle.scoring.exact import Change
from puzzle.stages.common import sequences_of, stored_dtype, streamed_teacher
from puzzle.stages.score import ScoreJob
from puzzle.teacher import Shards, read_tensors
from puzzle.types import ConfigError, CorruptFileError
from puzzle.variants import run_item

TENSORS = "importance.safetensors"


def make_importance(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    for unit in missing:
        if unit.path == run.importance:
            _publish_importance(run, unit, progress)
        else:
            asking = next(one for one in run.contenders if one.drops == unit.path)
            _publish_drops(asking, unit, progress)
        progress.done(unit.path.name)


def _publish_importance(run: Run, unit: Planned, progress: Progress) -> None:
    """Of every layer on the calibration tokens that ``init`` takes, in one pass of the teacher."""
    how = run.config.prune.importance if run.config.prune else ImportanceConfig()
    teacher = streamed_teacher(run, torch.float32)
    stream = Stream.of(teacher, sequences_of(run, "train", run.config.init.sequences))
    found: list[LayerImportance] = []
    for index in range(teacher.num_layers):
        layer = teacher.layer(index)
        found.append(layer_importance(layer, stream.passes(layer), how))
        stream.advance(layer)
        progress.fraction(1 / teacher.num_layers)
    last = Scores(how)
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

    artifacts.publish_folder(unit.path, unit.inputs, write)


def _publish_drops(run: Run, unit: Planned, progress: Progress) -> None:
    """What leaving out so many consecutive layers costs, by metric and by the first of them."""
    together = num_dropped(run.pruning, run.shape) if run.pruning.layers_by == "contiguous" else 1
    firsts = range(run.shape.num_layers - together + 1)
    scores: dict[str, dict[str, float]] = {}
    with ScoreJob(run) as job:
        for first in firsts:
            change = Change(str(first), (run_item(first, first + together - 1),))
            ((_, values),) = job.exact([change])
            for metric, column in values.items():
                scores.setdefault(metric, {})[str(first)] = column.mean().item()
            progress.fraction(1 / len(firsts))
    if (metric := run.pruning.layers_metric) not in scores:
        raise ConfigError(f"prune.layers_metric: no score is called {metric!r}; there are {', '.join(scores)}")
    artifacts.publish_json(unit.path, unit.inputs, {"scores": scores})


def make_prune(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    publish_pruned(run, unit.inputs, unit.path, progress)
    progress.done(unit.path.name)


def publish_pruned(run: Run, inputs: Mapping[str, str], path: Path, progress: Progress | None = None) -> None:
    """The student as it is before distillation, as a unit at ``path``."""
    job = _Pruning(run)
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

    artifacts.publish_folder(path, inputs, write)


class _Pruning:
    """A student in the making, from one walk through the teacher; the paper's start sees no tokens."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._teacher = streamed_teacher(run, torch.float32)
        self._scores = read_tensors(run.importance / TENSORS)
        self._hidden = most_important(self._scores["hidden"], run.student_shape.hidden_size)
        self._both: SideBySide | None = None
        if run.config.init.start == "best":
            batches = sequences_of(run, "train", run.config.init.sequences)
            self._both = SideBySide(self._teacher, batches, self._hidden)
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
