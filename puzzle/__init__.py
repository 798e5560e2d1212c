"""Puzzle: turns a trained LLM into the most accurate model that fits a memory, throughput or latency limit."""

from __future__ import annotations

from puzzle.config import ConstraintFile, RunConfig
from puzzle.run import Run
from puzzle.types import (
    ConfigError,
    CorruptFileError,
    InfeasibleError,
    Item,
    MissingMeasurementError,
    ModelShape,
    PuzzleError,
    Score,
    Site,
    Solution,
    StaleUnitError,
    Workload,
)

__all__ = [
    "ConfigError",
    "ConstraintFile",
    "CorruptFileError",
    "InfeasibleError",
    "Item",
    "MissingMeasurementError",
    "ModelShape",
    "PuzzleError",
    "Run",
    "RunConfig",
    "Score",
    "Site",
    "Solution",
    "StaleUnitError",
    "Workload",
]
