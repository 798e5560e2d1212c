"""Global knowledge distillation: the whole student learns to predict what the whole teacher predicts.

Loss per token (Puzzle, section 4):

    kl_weight · D(teacher, student) + cosine_weight · Σ_l (1 − cos(h_student^l, h_teacher^l)) + lm_weight · CE

with h^l the residual stream after layer l, and D = KL(teacher ‖ student) unless the config says otherwise. Reads
teacher, student and ``train`` batches, which are a pure function of the step; a checkpoint holds weights, optimiser
state and step, so a resumed run is the uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from puzzle.config import KdConfig
from puzzle.data.batches import Batch
from puzzle.metrics import divergence_loss, prediction_weights
from puzzle.modeling import PuzzleForCausalLM
from puzzle.schedule import BETAS, CLIP_NORM, warmup_cosine
from puzzle.teacher import Compute, freeze, read_tensors, residual_stream
from puzzle.types import ConfigError

STATE = "state.safetensors"


def distillation_loss(student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, batch: Batch, config: KdConfig) -> Tensor:
    """The loss above; where only some tokens count, KL and CE are those of predicting them."""
    with torch.no_grad():
        teacher_states = list(residual_stream(teacher, batch))
    states = list(residual_stream(student, batch))
    hidden, teacher_hidden = student.model.norm(states[-1]), teacher.model.norm(teacher_states[-1])
    loss = torch.zeros((), device=batch.ids.device)
    weights = prediction_weights(batch)
    if config.kl_weight:
        heads = (student.lm_head, teacher.lm_head)
        divergence = divergence_loss(hidden, teacher_hidden, heads, weights, config.divergence, config.temperature)
        loss = loss + config.kl_weight * divergence
    if config.cosine_weight:
        pairs = zip(states, teacher_states, strict=True)
        cosines = [F.cosine_similarity(own.float(), other.float(), dim=-1) for own, other in pairs]
        loss = loss + config.cosine_weight * torch.stack([(1 - cosine).mean() for cosine in cosines]).sum()
    if config.lm_weight:
        logits = student.lm_head(hidden[:, :-1]).float().flatten(0, 1)
        each = F.cross_entropy(logits, batch.ids[:, 1:].flatten(), reduction="none")
        counted = weights[:, :-1].flatten()
        loss = loss + config.lm_weight * (each * counted).sum() / counted.sum().clamp_min(1)
    return loss


class Distillation:
    """A student under GKD: its optimiser and the number of steps done."""

    def __init__(
        self, student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, config: KdConfig, compute: Compute
    ) -> None:
        self.student, self.teacher, self.config, self.compute = student, teacher, config, compute
        self.step = 0
        self.floor = config.min_learning_rate / config.learning_rate
        self.parameters = dict(student.named_parameters())
        student.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
        )

    def run(self, batches: Callable[..., Batch], until: int, steps: int, on_step: Callable[[float], None]) -> None:
        """Trains up to step ``until`` of a schedule of ``steps``; ``on_step`` gets each step's loss."""
        while self.step < until:
            factor = warmup_cosine(self.step, steps, self.config.warmup_steps, self.floor)
            self.optimiser.param_groups[0]["lr"] = self.config.learning_rate * factor
            batch = batches(step=self.step).to(self.compute.device)
            with self.compute.autocast():
                loss = distillation_loss(self.student, self.teacher, batch, self.config)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP_NORM)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            if not math.isfinite(value := loss.item()):
                raise ConfigError(f"kd: the loss is not finite at step {self.step}; lower kd.learning_rate")
            on_step(value)

    def finish(self) -> PuzzleForCausalLM:
        return freeze(self.student)

    def save(self, folder: Path) -> dict[str, int]:
        """Writes weights and optimiser state; returns the marker's payload."""
        tensors = {f"model/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / STATE)
        return {"step": self.step}

    def load(self, folder: Path, payload: Mapping[str, int]) -> None:
        """Continues from what :meth:`save` wrote."""
        tensors = read_tensors(folder / STATE)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model/{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")  # absent where a parameter never got a gradient
                state = {key: tensors[f"{key}/{name}"] for key in keys if f"{key}/{name}" in tensors}
                self.optimiser.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
        self.step = payload["step"]
