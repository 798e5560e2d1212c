"""Uniform architectures near a target: every layer alike, narrower or fewer of them (Minitron's search, 2407.14679).

Reads the teacher's shape and a grid of widths and depths; computes the shapes whose parameters are within a few percent
of a target. It is a small exhaustive search: grids have tens of values at most. Which of them is best is for a
tournament to say (halving.py); their parameters say nothing about that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from puzzle.types import ConfigError, ModelShape
from puzzle.variants import model_params

__all__ = ["UniformGrid", "uniform_shapes"]

WITHIN = 0.05  # of the target, either way


@dataclass(frozen=True)
class UniformGrid:
    """What to choose from, along each axis; empty: the teacher's own alone. Heads go with whole KV groups."""

    hidden_sizes: Sequence[int] = ()
    intermediate_sizes: Sequence[int] = ()
    num_attention_heads: Sequence[int] = ()
    num_layers: Sequence[int] = ()


def uniform_shapes(
    teacher: ModelShape, grid: UniformGrid, target_params: int, within: float = WITHIN
) -> tuple[ModelShape, ...]:
    """All of the grid whose parameters are within a share ``within`` of the target, the nearest first.

    ConfigError for a value that the teacher cannot be pruned to, and where nothing of the grid is near the target. The
    shapes of depth-pruned models have no windows: which layers stay decides on them.
    """
    if teacher.moe_layers:
        raise ConfigError("uniform architectures of a teacher with experts are not known; search with Puzzle")
    group = teacher.num_attention_heads // teacher.num_kv_heads
    axes = {
        "hidden_size": (grid.hidden_sizes, teacher.hidden_size, 1),
        "intermediate_size": (grid.intermediate_sizes, teacher.intermediate_size, 1),
        "num_attention_heads": (grid.num_attention_heads, teacher.num_attention_heads, group),
        "num_layers": (grid.num_layers, teacher.num_layers, 1),
    }
    choices = []
    for name, (values, most, multiple) in axes.items():
        for value in values:
            if not 0 < value <= most or value % multiple:
                of = f" and a multiple of {multiple}" if multiple > 1 else ""
                raise ConfigError(f"{name} {value}: give a number of at most {most}, the teacher's{of}")
        choices.append(sorted(set(values)) or [most])
    found = [_pruned(teacher, group, *one) for one in itertools.product(*choices)]
    distances = {shape: abs(model_params(shape) - target_params) for shape in found}
    near = [shape for shape in found if distances[shape] <= within * target_params]
    if not near:
        nearest = model_params(min(found, key=distances.__getitem__))
        raise ConfigError(
            f"no architecture of the grid has {target_params:,} parameters, {within:.0%} more or less (the nearest "
            f"has {nearest:,}); give more widths or depths, or another target"
        )
    return tuple(sorted(near, key=distances.__getitem__))


def _pruned(teacher: ModelShape, group: int, hidden: int, intermediate: int, heads: int, layers: int) -> ModelShape:
    return replace(
        teacher,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_kv_heads=heads // group,
        num_layers=layers,
        windows=teacher.windows if layers == teacher.num_layers else (),
    )
