"""The grid that ``profile`` measures, as points. Reads a GridFile and the model's shape; pure, writes nothing.

A point is one forward: a whole prompt (prefill), or one more token per sequence (decode).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from puzzle.config import GridFile
from puzzle.profiling.table import GRID_KEY
from puzzle.types import ConfigError, Cost, CostSetting, Gap, ModelShape, Phase


@dataclass(frozen=True)
class GridPoint:
    """``context_tokens``: prefill, the prompt length; decode, the tokens already in the KV cache."""

    phase: Phase
    batch_size: int
    context_tokens: int

    @property
    def id(self) -> str:
        """``prefill.b8.t128``: also the name of the unit that holds this point's costs."""
        return f"{self.phase}.b{self.batch_size}.t{self.context_tokens}"

    @property
    def new_tokens(self) -> int:
        """Tokens of one sequence that the forward computes."""
        return self.context_tokens if self.phase == "prefill" else 1

    @property
    def cached_tokens(self) -> int:
        """Tokens of one sequence that are in the KV cache before the forward."""
        return 0 if self.phase == "prefill" else self.context_tokens

    @property
    def total_tokens(self) -> int:
        return self.cached_tokens + self.new_tokens

    def cost(
        self,
        shape_id: str,
        setting: CostSetting,
        ms: tuple[float, float, float],
        source: Literal["measured", "estimate"] = "measured",
    ) -> Cost:
        """What a shape takes of this forward: ``ms`` are the median, 10th and 90th percentile."""
        median, p10, p90 = ms
        return Cost(shape_id, **vars(self), **vars(setting), ms=median, ms_p10=p10, ms_p90=p90, source=source)

    def gap(self, reason: str, shape_id: str | None = None) -> Gap:
        """Why there is no time of this forward, or of one shape in it."""
        return Gap(**vars(self), reason=reason, shape_id=shape_id)


def grid_points(grid: GridFile, shape: ModelShape) -> tuple[GridPoint, ...]:
    """Every point of the grid once, sorted within each phase. ConfigError for one longer than the model's positions."""
    lengths: dict[Phase, tuple[int, ...]] = {"prefill": grid.prefill_tokens, "decode": grid.decode_context_tokens}
    points = tuple(
        GridPoint(phase, batch_size, tokens)
        for phase, of_phase in lengths.items()
        for batch_size in sorted(set(grid.batch_sizes))
        for tokens in sorted(set(of_phase))
    )
    if not points:
        raise ConfigError("the profiling grid is empty; give batch_sizes and prefill_tokens or decode_context_tokens")
    for point in points:
        if (excess := point.total_tokens - shape.max_position_embeddings) > 0:
            raise ConfigError(
                f"profiling grid: {GRID_KEY[point.phase]} contains {point.context_tokens}, but the model has "
                f"{shape.max_position_embeddings} positions; at most {point.context_tokens - excess} is allowed; "
                "name a copy of the grid's file without it in profile.grid"
            )
    return points


def extremes(points: Iterable[GridPoint]) -> tuple[GridPoint, ...]:
    """Of every phase and batch size, the shortest and the longest."""
    lengths: dict[tuple[Phase, int], list[GridPoint]] = {}
    for point in sorted(points, key=lambda one: one.context_tokens):
        lengths.setdefault((point.phase, point.batch_size), []).append(point)
    return tuple(point for of in lengths.values() for point in dict.fromkeys((of[0], of[-1])))
