"""The teacher's signal on disk: made once for all steps, by a teacher that need not fit in memory, and then read.

Two kinds (``kd.signal``). ``hidden``: the final hidden states (T, D) of every batch, as exact as the training's dtype;
the teacher's head alone is needed to train. ``sampled``: K tokens drawn from the teacher's prediction at each position,
with its entropy H, so that

    KL(teacher ‖ student) ≈ −(1/K) Σ_k log q(y_k) − H,   y_k ~ p

whose expectation is the KL, and whose gradient's expectation is the KL's. To keep the K likeliest tokens instead
would be biased: what they leave out is never corrected.

Writes ``signal/steps-N/``, units of :data:`CHUNK_STEPS` steps that are made once for all students of a run; per token
D times 2 or 4 bytes, or 4 K + 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from puzzle import artifacts
from puzzle.blocks.stream import Stream
from puzzle.config import KdConfig
from puzzle.data.batches import Batch
from puzzle.kd.losses import Drawn, Signal
from puzzle.memory_plan import LOGIT_TOKENS
from puzzle.ranks import Ranks
from puzzle.teacher import Teacher, read_tensors

CHUNK_STEPS = 16


@dataclass(frozen=True)
class Stored:
    """The signal of steps 0 to ``steps`` in ``folder``, of batches that are a pure function of the step."""

    folder: Path
    teacher: Teacher
    batches: Callable[[int], Batch]
    steps: int
    config: KdConfig
    seed: int

    def make(self, inputs: Mapping[str, str], ranks: Ranks) -> None:
        """What is missing of it, or this rank's share."""
        firsts = range(0, self.steps, CHUNK_STEPS)
        for first in firsts[ranks.rank :: ranks.count]:
            path, made_from = self._unit(first), {**inputs, "steps": str(len(self._steps(first)))}
            if path.exists() and artifacts.changed_inputs(path, made_from):
                artifacts.remove(path)
            if not path.exists():
                artifacts.publish_folder(path, made_from, functools.partial(self._write, first))

    def signal(self, step: int, rows: slice, device: torch.device) -> Signal:
        """Of some rows of the step's batch."""
        tensors = read_tensors(self._file(self._unit(step - step % CHUNK_STEPS), step))
        part = {name: tensor[rows].to(device) for name, tensor in tensors.items()}
        if self.config.signal == "hidden":
            return Signal((), part["hidden"], self.head)
        return Signal((), None, self.head, Drawn(part["tokens"], part["entropy"]))

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self.teacher.top.lm_head
        return head

    def _steps(self, first: int) -> range:
        return range(first, min(first + CHUNK_STEPS, self.steps))

    def _unit(self, first: int) -> Path:
        return self.folder / f"steps-{first:08d}"

    def _file(self, unit: Path, step: int) -> Path:
        return unit / f"{step:08d}.safetensors"

    @torch.no_grad()
    def _write(self, first: int, aside: Path) -> None:
        steps = self._steps(first)
        stream = Stream.of(self.teacher, [self.batches(step) for step in steps])
        for index in range(self.teacher.num_layers):
            stream.advance(self.teacher.layer(index))
        for place, step in enumerate(steps):
            hidden = self.teacher.top.model.norm(stream.hidden(place).float())
            tensors = (
                {"hidden": hidden.to(self.teacher.dtype)}
                if self.config.signal == "hidden"
                else self._draw(hidden, step)
            )
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, self._file(aside, step))

    def _draw(self, hidden: Tensor, step: int) -> dict[str, Tensor]:
        """Tokens (B, T, K) int32 and entropies (B, T), in nats."""
        seed = int(np.random.default_rng([self.seed, step]).integers(2**63))
        generator = torch.Generator(hidden.device).manual_seed(seed)
        tokens, entropies = [], []
        for part in hidden.flatten(0, 1).split(LOGIT_TOKENS):
            log_p = F.log_softmax(self.head(part) / self.config.temperature, -1)
            p = log_p.exp()
            tokens.append(torch.multinomial(p, self.config.signal_samples, replacement=True, generator=generator).int())
            entropies.append(-torch.linalg.vecdot(p, log_p))
        shape = hidden.shape[:2]
        return {"tokens": torch.cat(tokens).unflatten(0, shape), "entropy": torch.cat(entropies).unflatten(0, shape)}
