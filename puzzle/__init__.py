"""Puzzle: turns a trained LLM into the most accurate model that fits a memory, throughput or latency limit."""

from __future__ import annotations

from puzzle.config import ConstraintFile as ConstraintFile
from puzzle.config import RunConfig as RunConfig
from puzzle.notebook import open_run as open_run
from puzzle.run import Run as Run
from puzzle.types import ConfigError as ConfigError
from puzzle.types import CorruptFileError as CorruptFileError
from puzzle.types import InfeasibleError as InfeasibleError
from puzzle.types import Item as Item
from puzzle.types import MissingMeasurementError as MissingMeasurementError
from puzzle.types import ModelShape as ModelShape
from puzzle.types import PuzzleError as PuzzleError
from puzzle.types import Score as Score
from puzzle.types import Site as Site
from puzzle.types import Solution as Solution
from puzzle.types import StaleUnitError as StaleUnitError
from puzzle.types import Workload as Workload
