"""Whole models timed at a workload, beside the sum of their parts timed in the same rounds.

Reads models and their architectures. What the search predicted comes from a table measured earlier; on a machine whose
speed drifts, only parts and whole of the same minute tell whether times add up, so both are given. A workload of
another device or runtime is not timed, and says so by its absence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from puzzle.modeling import PuzzleForCausalLM
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import device_name
from puzzle.profiling.measure import measure_models, measure_wholes
from puzzle.profiling.probes import PointTooLargeError
from puzzle.profiling.stack import TORCH_DTYPES, Dtype, SiteStack
from puzzle.profiling.table import ENGINE
from puzzle.progress import console
from puzzle.run import Run
from puzzle.search.constraints import workloads
from puzzle.types import Spec, Workload

DECODE_POINTS = 3


@dataclass(frozen=True)
class Speed:
    """Measured time to the first token, per further token, and generated tokens per second over the batch."""

    ttft_ms: float
    tpot_ms: float
    output_tok_per_s: float


@dataclass(frozen=True)
class Timed:
    """A whole model's speed, and that of the sum of its parts, where it is made of parts that were searched for."""

    whole: Speed
    parts: Speed | None


@dataclass(frozen=True)
class Subject:
    """A model and the specs at its sites (of a pruning's student: those of the teacher)."""

    model: PuzzleForCausalLM
    specs: tuple[Spec, ...]


def measured_speed(
    run: Run, subjects: Mapping[str, Subject], batch_sizes: Mapping[str, int]
) -> dict[str, dict[str, Timed]]:
    """By workload and model; workloads that this device and runtime do not serve are left out."""
    device = str(next(iter(subjects.values())).model.device)
    served = [
        workload
        for workload in workloads(run.constraint_file, run.shape)
        if (workload.device, workload.runtime, workload.tp) == (device_name(device), ENGINE, 1)
        and workload.weights in TORCH_DTYPES
        and workload.kv == workload.weights
    ]
    found = {}
    for workload in served:
        try:
            found[workload.name] = _measure(run, workload, batch_sizes[workload.name], subjects)
        except (PointTooLargeError, torch.OutOfMemoryError):  # the teacher often does not fit where its student does
            why = "teacher and student do not fit beside one another, so they are not timed"
            console.print(f"{workload.name}: {why}", soft_wrap=True)
    return found


def _measure(run: Run, workload: Workload, batch_size: int, subjects: Mapping[str, Subject]) -> dict[str, Timed]:
    weights: Dtype = workload.weights  # type: ignore[assignment]
    dtype, device = TORCH_DTYPES[weights], str(next(iter(subjects.values())).model.device)
    models = {
        name: subject.model if subject.model.dtype == dtype else nn.Module.to(copy.deepcopy(subject.model), dtype)
        for name, subject in subjects.items()
    }
    last = workload.isl + max(0, workload.osl - 2)
    contexts = sorted(
        {round(workload.isl + (last - workload.isl) * k / (DECODE_POINTS - 1)) for k in range(DECODE_POINTS)}
    )
    points = [GridPoint("prefill", batch_size, workload.isl), *(GridPoint("decode", batch_size, c) for c in contexts)]
    repeats, seed = run.grid.repeats, run.config.seed
    if run.config.prune is not None:
        alone = [measure_models(models, point, repeats, seed) for point in points]
        return {name: Timed(_speed(workload, batch_size, [at[name] for at in alone]), None) for name in models}
    config = next(iter(models.values())).config
    specs = [spec for item in run.items for spec in item.specs]
    stack = SiteStack.build(run.shape, config, specs, device, weights, seed)
    pairs = {name: (model, subjects[name].specs) for name, model in models.items()}
    found = [measure_wholes(stack, pairs, point, repeats, seed) for point in points]
    return {
        name: Timed(
            _speed(workload, batch_size, [at[name].whole_ms for at in found]),
            _speed(workload, batch_size, [at[name].parts_ms for at in found]),
        )
        for name in models
    }


def _speed(workload: Workload, batch_size: int, values: list[float]) -> Speed:
    """Decode time is linear between evenly spaced contexts: the trapezoid's mean."""
    ttft, decode = values[0], values[1:]
    inner = [(left + right) / 2 for left, right in zip(decode, decode[1:], strict=False)] or decode
    tpot = sum(inner) / len(inner)
    end_to_end = ttft + (workload.osl - 1) * tpot
    return Speed(ttft, tpot, batch_size * workload.osl / end_to_end * 1e3)
