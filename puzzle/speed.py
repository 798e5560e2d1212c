"""Whole models timed at a workload, to hold against what the cost table predicted.

Reads models; times teacher and student interleaved in the same process. A workload of another device or runtime is not
timed, and says so by its absence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from puzzle.modeling import PuzzleForCausalLM
from puzzle.profiling.device import device_name
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.measure import ENGINE, TORCH_DTYPES, ModelProbe, measure_many
from puzzle.run import Run
from puzzle.search.constraints import workloads
from puzzle.types import Workload

DECODE_POINTS = 3


@dataclass(frozen=True)
class Speed:
    """Measured time to the first token, per further token, and generated tokens per second over the batch."""

    ttft_ms: float
    tpot_ms: float
    output_tok_per_s: float


def measured_speed(
    run: Run, models: Mapping[str, PuzzleForCausalLM], batch_sizes: Mapping[str, int]
) -> dict[str, dict[str, Speed]]:
    """By workload and model; workloads that this device and runtime do not serve are left out."""
    device = device_name(str(next(iter(models.values())).device))
    served = [
        workload
        for workload in workloads(run.constraint_file, run.shape)
        if (workload.device, workload.runtime, workload.tp) == (device, ENGINE, 1) and workload.weights in TORCH_DTYPES
    ]
    return {
        workload.name: _measure(workload, batch_sizes[workload.name], models, run.grid.repeats, run.config.seed)
        for workload in served
    }


def _measure(
    workload: Workload, batch_size: int, models: Mapping[str, PuzzleForCausalLM], repeats: int, seed: int
) -> dict[str, Speed]:
    dtype = TORCH_DTYPES[workload.weights]  # type: ignore[index]
    cast = {
        name: model if model.dtype == dtype else nn.Module.to(copy.deepcopy(model), dtype)
        for name, model in models.items()
    }
    last = workload.isl + max(0, workload.osl - 2)
    contexts = sorted(
        {round(workload.isl + (last - workload.isl) * k / (DECODE_POINTS - 1)) for k in range(DECODE_POINTS)}
    )
    points = [GridPoint("prefill", batch_size, workload.isl), *(GridPoint("decode", batch_size, c) for c in contexts)]
    ms: dict[str, list[float]] = {name: [] for name in models}
    for point in points:
        timings = measure_many([ModelProbe(name, model, point) for name, model in cast.items()], repeats, seed)
        for name in models:
            ms[name].append(timings[name].ms)
    return {name: _speed(workload, batch_size, values) for name, values in ms.items()}


def _speed(workload: Workload, batch_size: int, values: list[float]) -> Speed:
    """Decode time is linear between evenly spaced contexts: the trapezoid's mean."""
    ttft, decode = values[0], values[1:]
    inner = [(left + right) / 2 for left, right in zip(decode, decode[1:], strict=False)] or decode
    tpot = sum(inner) / len(inner)
    end_to_end = ttft + (workload.osl - 1) * tpot
    return Speed(ttft, tpot, batch_size * workload.osl / end_to_end * 1e3)


__all__ = ["Speed", "measured_speed"]
