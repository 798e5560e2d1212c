"""What the search is compared with and needs a model for: true evaluations, the quantised teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle import formats
from puzzle.evaluate import Comparison, compared
from puzzle.modeling import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.scoring.exact import Change
from puzzle.stages.common import sequences_of, teacher_of
from puzzle.stages.score import ScoreJob
from puzzle.teacher import layers_of
from puzzle.variants import is_teacher

FP8_LARGEST, INT4_LARGEST = 448.0, 7.0
HALF_SMALLEST = 2.0**-24
ROUTER = "mlp.gate.weight"  # a matrix, too, but formats.py leaves it in 16 bits


@contextmanager
def true_scores(run: Run, metric: str, share: float = 1.0) -> Iterator[Callable[[tuple[str, ...]], float]]:
    """The mean of ``metric`` of a whole architecture on that share of the sequences that its parts were scored on."""
    score = run.config.score
    fewer = score.model_copy(update={"sequences": max(1, round(share * score.sequences)), "until_se": None})
    by_id = {item.id: item for item in run.items}
    with ScoreJob(replace(run, config=run.config.model_copy(update={"score": fewer}))) as job:

        def true_score(chosen: tuple[str, ...]) -> float:
            items = tuple(by_id[item_id] for item_id in chosen if not is_teacher(by_id[item_id]))
            if not items:
                return 0.0
            ((_, values),) = job.exact([Change("whole", items)])
            return values[metric].mean().item()

        yield true_score


def quantised_quality(run: Run, dtype: str, split: str) -> Comparison:
    """Of the teacher with its layers' matrices rounded to nearest in ``dtype``, on the sequences of a split."""
    teacher = teacher_of(run)
    return compared(quantised(teacher, dtype), teacher, sequences_of(run, split, run.num_sequences(split)))


@torch.no_grad()
def quantised(teacher: PuzzleForCausalLM, dtype: str) -> PuzzleForCausalLM:
    """A copy; embedding, head, norms, biases and routers stay as they are (formats.py)."""
    model = copy.deepcopy(teacher)
    for layer in layers_of(model):
        for name, parameter in layer.named_parameters():
            if parameter.dim() > 1 and not name.endswith(ROUTER):
                parameter.copy_(round_to_nearest(parameter, dtype))
    return model


def round_to_nearest(weight: Tensor, dtype: str) -> Tensor:
    """(..., fan_in) as ``dtype`` stores it: one scale for each row, or for each group of a row, by its largest number.

    fp8 is e4m3 with scales in fp32; int4 is symmetric (-8 to 7) with scales in fp16.
    """
    rows = weight.float().flatten(0, -2)  # (R, fan_in)
    group = formats.format_of(dtype).group or rows.shape[1]
    groups = F.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))  # (R, groups, group)
    largest = groups.abs().amax(-1, keepdim=True)
    if dtype == "fp8":
        scale = (largest / FP8_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (groups / scale).to(torch.float8_e4m3fn).float() * scale
    else:
        assert dtype.startswith("int4"), dtype
        scale = (largest / INT4_LARGEST).half().float().clamp_min(HALF_SMALLEST)
        rounded = (groups / scale).round().clamp(-INT4_LARGEST - 1, INT4_LARGEST) * scale
    kept: Tensor = rounded.flatten(1)[:, : rows.shape[1]]
    return kept.reshape(weight.shape)
