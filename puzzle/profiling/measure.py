"""Times every distinct shape of a search space, and whole models, at one point of the grid, over many rounds.

Gives Cost records, gaps and Timings; writes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from puzzle.modeling import PuzzleForCausalLM
from puzzle.profiling.correction import WholePoint
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.probes import (
    DETAILS,
    DetailProbe,
    ModelProbe,
    PointTooLargeError,
    Probe,
    Timing,
    site_probe,
    too_large,
)
from puzzle.profiling.stack import SiteStack
from puzzle.profiling.table import REST, SKIPPED
from puzzle.space import PARTS
from puzzle.types import Cost, Gap, Spec
from puzzle.variants import shape_id

WARMUP_ROUNDS = 2
ROUNDS_AGAIN = 4  # times as many, where a time was lost in noise


def measure_many(probes: Sequence[Probe], repeats: int, seed: int) -> dict[str, Timing]:
    """Runs every probe once a round, in a new random order each round, so that drift hits all alike.

    ``repeats`` rounds count, after a few that do not. The order is drawn from ``seed``. Names must differ over probes.
    Where there are several, each runs once untimed first: in use a step follows a step of the same model, not one of
    another that has just emptied the caches.
    """
    rng = random.Random(seed)
    passes = 2 if len(probes) > 1 else 1
    samples: dict[str, list[float]] = {}
    for round_number in range(WARMUP_ROUNDS + repeats):
        order = list(probes)
        rng.shuffle(order)
        readings = [reading for probe in order for reading in [probe.run(rng) for _ in range(passes)][-1].items()]
        assert len({name for name, _ in readings}) == len(readings), "two probes measure the same name"
        if round_number >= WARMUP_ROUNDS:
            for name, ms in readings:
                samples.setdefault(name, []).append(ms)
    return {name: Timing.of(values) for name, values in samples.items()}


@dataclass(frozen=True)
class Measured:
    """What one point of the grid gave: costs, gaps where there are none, and times of ``details`` of models."""

    costs: tuple[Cost, ...]
    gaps: tuple[Gap, ...] = ()
    details: tuple[Cost, ...] = ()


def measure_point(stack: SiteStack, point: GridPoint, repeats: int, seed: int) -> Measured:
    """Of every distinct shape but skip, and of the rest. A point that does not fit in memory is a gap.

    Where small shapes are lost in the noise of differences, the point is measured again on more rounds; what still
    is no positive time is a gap.
    """
    try:
        probes = [site_probe(stack, point), DetailProbe(stack, point)]
        timings = measure_many(probes, repeats, seed)
        if any(timings[name].ms <= 0 for name in (*stack.sites, REST)):
            timings = measure_many(probes, ROUNDS_AGAIN * repeats, seed)
    except (PointTooLargeError, torch.OutOfMemoryError) as error:
        if not isinstance(error, PointTooLargeError):
            error = PointTooLargeError(too_large(stack.device, point))
        return Measured((), (point.gap(str(error)),))
    found = {
        name: point.cost(name, stack.setting, (timing.ms, timing.ms_p10, timing.ms_p90))
        for name, timing in timings.items()
        if timing.ms > 0
    }
    wanted = (*stack.sites, REST)
    return Measured(
        tuple(found[name] for name in wanted if name in found),
        tuple(point.gap("too short to be told from noise", name) for name in wanted if name not in found),
        tuple(found[name] for name in DETAILS if name in found),
    )


def measure_wholes(
    stack: SiteStack,
    models: Mapping[str, tuple[PuzzleForCausalLM, Sequence[Spec]]],
    point: GridPoint,
    repeats: int,
    seed: int,
) -> dict[str, WholePoint]:
    """Whole models (and the specs at their sites), and the sums of their parts, in the same rounds.

    PointTooLargeError, or torch's own error, where they do not fit in memory together.
    """
    probes = [site_probe(stack, point), *_model_probes({name: model for name, (model, _) in models.items()}, point)]
    ms = {name: timing.ms for name, timing in measure_many(probes, repeats, seed).items()}
    found = {}
    for name, (_, specs) in models.items():
        ids = [one for spec in specs if (one := shape_id(spec, stack.shape)) not in SKIPPED]
        attention, ffn = (sum(ms[one] for one in ids if one.startswith(part)) for part in PARTS)
        found[name] = WholePoint(**vars(point), whole_ms=ms[name], rest_ms=ms[REST], attention_ms=attention, ffn_ms=ffn)
    return found


def measure_models(
    models: Mapping[str, PuzzleForCausalLM], point: GridPoint, repeats: int, seed: int
) -> dict[str, float]:
    """Milliseconds of whole models alone; errors as in :func:`measure_wholes`."""
    timings = measure_many(_model_probes(models, point), repeats, seed)
    return {name: timings[name].ms for name in models}


def _model_probes(models: Mapping[str, PuzzleForCausalLM], point: GridPoint) -> list[Probe]:
    return [ModelProbe(name, model, point) for name, model in models.items()]
