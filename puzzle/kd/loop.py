"""The loop of global distillation, on one device or on several.

Reads teacher, student and ``train`` batches, which are a pure function of the step; minimises the loss of losses.py
with AdamW. Each rank takes its rows of a batch, in pieces that fit; losses and gradients are sums over pieces and
ranks of parts of the step's means, so a step is the same however it is cut up. A checkpoint holds weights, the map
between widths and optimiser state, one file a layer, whole whatever the number of ranks: a resumed run is the
uninterrupted one, bit for bit on one rank.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from puzzle.config import KdConfig
from puzzle.data.batches import Batch
from puzzle.kd.losses import (
    Counts,
    Objective,
    Observed,
    Signal,
    fitted_map,
    layer_pairs,
    loss_of_layers,
    loss_of_logits,
    total_loss,
)
from puzzle.kd.stored import Stored
from puzzle.modeling import PuzzleForCausalLM
from puzzle.ranks import Ranks, rows_of
from puzzle.schedule import BETAS, CLIP_NORM, warmup_cosine
from puzzle.sharding import mesh_of, placed, shard_root, whole
from puzzle.teacher import Compute, freeze, layers_of, read_tensors
from puzzle.types import ConfigError

MAP = "to_teacher"
ALONE = Ranks()


@dataclass(frozen=True)
class StepRecord:
    """One step as the log tells it: ``parts`` of the loss without their weights, the norm before clipping."""

    step: int
    tokens: int
    loss: float
    parts: Mapping[str, float]
    balance: float
    learning_rate: float
    gradient_norm: float
    tokens_per_s: float

    def figures(self) -> dict[str, float]:
        """By the names that they have in logs."""
        others = {name: value for name, value in vars(self).items() if name not in ("step", "parts")}
        return {**others, **self.parts}


class DivergedError(ConfigError):
    """The loss or its gradient is no longer a number."""


class Distillation:
    """A student under GKD: its optimiser and the number of steps done.

    ``teacher`` may be None where the loss needs none, or its signal is ``stored``. With several ``ranks``, both models
    come from :func:`puzzle.sharding.load_sharded`, and every rank calls every method.
    """

    def __init__(
        self,
        student: PuzzleForCausalLM,
        teacher: PuzzleForCausalLM | None,
        config: KdConfig,
        compute: Compute,
        ranks: Ranks = ALONE,
        stored: Stored | None = None,
    ) -> None:
        assert teacher is not None or stored is not None or not config.needs_teacher
        self._stored = stored
        self.student, self.config, self.compute, self.ranks = student, config, compute, ranks
        self.step = 0
        self.balance: float | None = None  # of the step before
        self.last: StepRecord | None = None
        self.floor = config.min_learning_rate / config.learning_rate
        student.requires_grad_(True)
        self._teacher, self._objective = _observers(student, teacher, config)
        if (mesh := mesh_of(compute.device, ranks.count)) is not None:
            shard_root(self._objective, mesh)
            if self._teacher is not None:
                shard_root(self._teacher, mesh)
        if config.checkpoint_activations:
            for layer in layers_of(student):  # within what FSDP does around a layer's forward
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
        self.parameters = dict(student.named_parameters())
        if self._objective.to_teacher is not None:
            self.parameters[MAP] = self._objective.to_teacher
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
        )

    def run(self, batches: Callable[..., Batch], until: int, steps: int, on_step: Callable[[float], None]) -> None:
        """Trains up to step ``until`` of a schedule of ``steps``; ``on_step`` gets each step's loss.

        DivergedError, before the weights have seen it, where the loss or its gradient is not finite.
        """
        while self.step < until:
            started = time.monotonic()
            factor = warmup_cosine(self.step, steps, self.config.warmup_steps, self.floor)
            rate = self.optimiser.param_groups[0]["lr"] = self.config.learning_rate * factor
            batch = batches(step=self.step)
            if self.balance is None:
                self.balance = self._balance_of(self._first_parts(batch))
            balance = self.balance
            parts = self._backward(batch, balance)
            loss = total_loss(parts, self.config, balance).item()
            norm = whole(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP_NORM)).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "gradient of the loss" if math.isfinite(loss) else "loss"
                raise DivergedError(f"kd: the {what} is not finite at step {self.step + 1}; lower kd.learning_rate")
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            self.balance = self._balance_of(parts)
            tokens, seconds = batch.ids.numel(), time.monotonic() - started
            values = {name: part.item() for name, part in parts.items()}
            self.last = StepRecord(
                self.step, self.step * tokens, loss, values, balance, rate, norm, tokens / max(seconds, 1e-9)
            )
            on_step(loss)

    def _backward(self, batch: Batch, balance: float) -> dict[str, Tensor]:
        """The step's gradients, and the parts of its loss."""
        found: list[dict[str, Tensor]] = []
        for parts in self._parts(batch):
            total_loss(parts, self.config, balance).backward()
            found.append({name: part.detach() for name, part in parts.items()})
        return self._summed(found)

    @torch.no_grad()
    def _first_parts(self, batch: Batch) -> dict[str, Tensor]:
        """What a first step's balance is taken from."""
        if self.config.balance == "fixed":
            return {}
        return self._summed(list(self._parts(batch)))

    def _balance_of(self, parts: Mapping[str, Tensor]) -> float:
        if self.config.balance == "fixed":
            return 1.0
        logits, layers = (of(parts, self.config).item() for of in (loss_of_logits, loss_of_layers))
        return logits / layers if layers > 0 else 1.0

    def _parts(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """The parts of the loss that each piece of this rank's rows has in those of the whole step."""
        counts, ranks = Counts.of(batch), self.ranks
        rows = rows_of(len(batch), range(ranks.count), ranks.rank)
        size = self.config.micro_batch_size or len(batch)
        for first in range(rows.start, rows.stop, size):
            part = slice(first, min(first + size, rows.stop))
            piece = batch.rows(part).to(self.compute.device)
            with self.compute.autocast():
                parts: dict[str, Tensor] = self._objective(piece, self._signal(piece, part), counts)
            yield parts

    @torch.no_grad()
    def _signal(self, piece: Batch, rows: slice) -> Signal | None:
        """What the teacher says to a piece, which are ``rows`` of the step's batch."""
        if self._stored is not None:
            return self._stored.signal(self.step, rows, self.compute.device)
        if self._teacher is None:
            return None
        states, hidden = self._teacher(piece)
        return Signal(states, hidden, self._teacher.model.lm_head)

    def _summed(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Over the pieces and the ranks."""
        values = torch.stack([torch.stack([parts[name] for parts in found]).sum() for name in found[0]])
        if self.ranks.count > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(found[0], values, strict=True))

    def finish(self) -> PuzzleForCausalLM:
        for layer in layers_of(self.student):
            layer.__dict__.pop("forward", None)
        return freeze(self.student)

    def save(self, folder: Path | None) -> dict[str, Any]:
        """Writes weights and optimiser state, a file a layer; returns the marker's payload.

        Ranks that write nothing, with None for a folder, do their part in putting tensors together.
        """
        for group, names in self._groups().items():
            tensors: dict[str, Tensor] = {}
            for name in names:
                for key, value in (
                    ("model", self.parameters[name]),
                    *self.optimiser.state[self.parameters[name]].items(),
                ):
                    full = whole(value.detach())
                    if folder is not None:
                        tensors[f"{key}/{name}"] = full.cpu().contiguous()
            if folder is not None:
                save_file(tensors, folder / f"{group}.safetensors")
        return {"step": self.step, "balance": self.balance}

    @torch.no_grad()
    def load(self, folder: Path, payload: Mapping[str, Any]) -> None:
        """Continues from what :meth:`save` wrote, on any number of ranks."""
        for group, names in self._groups().items():
            tensors = read_tensors(folder / f"{group}.safetensors")
            for name in names:
                parameter = self.parameters[name]
                parameter.copy_(placed(tensors[f"model/{name}"], parameter))
                keys = ("step", "exp_avg", "exp_avg_sq")  # absent where a parameter never got a gradient
                state = {key: tensors[f"{key}/{name}"] for key in keys if f"{key}/{name}" in tensors}
                self.optimiser.state[parameter] = {
                    key: value.to(parameter.device) if key == "step" else placed(value, parameter)
                    for key, value in state.items()
                }
        self.step, self.balance = payload["step"], payload["balance"]

    def _groups(self) -> dict[str, list[str]]:
        """The parameters that lie in one file of a checkpoint: never more than a layer is put together at once."""
        groups: dict[str, list[str]] = {}
        for name in self.parameters:
            layer = name.removeprefix("model.layers.").split(".")[0] if name.startswith("model.layers.") else ""
            groups.setdefault(f"layer-{int(layer):04d}" if layer else "rest", []).append(name)
        return groups


def _observers(
    student: PuzzleForCausalLM, teacher: PuzzleForCausalLM | None, config: KdConfig
) -> tuple[Observed | None, Objective]:
    """The two models as the loss sees them."""
    if teacher is None or not config.needs_teacher:
        return None, Objective(student, (), None, config)
    pairs = layer_pairs(student.config, teacher.config, config.match_embedding) if config.compares_layers else ()
    own, others = tuple(layer for layer, _ in pairs), tuple(layer for _, layer in pairs)
    to_teacher = None
    if pairs and student.config.hidden_size != teacher.config.hidden_size:
        with torch.no_grad():
            every = [
                model.model.embed_tokens(torch.arange(model.config.vocab_size, device=model.device))
                for model in (student, teacher)
            ]
            to_teacher = fitted_map(*every)
    return Observed(teacher, others), Objective(student, own, to_teacher, config)


def distillation_loss(student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, batch: Batch, config: KdConfig) -> Tensor:
    """The loss on one batch, with a balance of 1."""
    seen_by, objective = _observers(student, teacher, config)
    signal = None
    if seen_by is not None:
        with torch.no_grad():
            states, hidden = seen_by(batch)
            signal = Signal(states, hidden, teacher.lm_head)
    return total_loss(objective(batch, signal, Counts.of(batch)), config, 1.0)
