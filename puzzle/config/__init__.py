"""What may stand in the files that users write: run configuration, constraint file, search space, profiling grid.

Frozen pydantic models; unknown keys are errors. yamlfiles.py reads files into them; editors show the descriptions
(schema.py).
"""

from puzzle.config.files import BoundFile, ConstraintFile, FusionFile, GridFile, LayerSpaceFile, SpaceFile, ValuesFile
from puzzle.config.library import BUILT_IN, OBJECTIVES, DistillConfig, ProfileConfig, RefineConfig, score_of
from puzzle.config.run import RunConfig
from puzzle.config.student import Aggregation, EvaluateConfig, ImportanceConfig, KdConfig, PruneConfig, TournamentConfig
from puzzle.config.text import DataConfig, GenerateConfig, SourceConfig, TokensConfig

__all__ = [
    "Aggregation",
    "BUILT_IN",
    "BoundFile",
    "ConstraintFile",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "FusionFile",
    "GenerateConfig",
    "GridFile",
    "ImportanceConfig",
    "KdConfig",
    "LayerSpaceFile",
    "OBJECTIVES",
    "ProfileConfig",
    "PruneConfig",
    "RefineConfig",
    "RunConfig",
    "SourceConfig",
    "SpaceFile",
    "TokensConfig",
    "TournamentConfig",
    "ValuesFile",
    "score_of",
]
