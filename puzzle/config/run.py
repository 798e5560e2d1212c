"""The configuration of a run: what every section is for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from puzzle.config.fields import Model, Natural, PositiveFloat
from puzzle.config.library import (
    AdditivityConfig,
    DistillConfig,
    InitConfig,
    ProfileConfig,
    RefineConfig,
    ScoreConfig,
)
from puzzle.config.student import (
    EvaluateConfig,
    ExportConfig,
    KdConfig,
    PruneConfig,
    TournamentConfig,
    WidthsConfig,
)
from puzzle.config.text import DataConfig, GenerateConfig


class RunConfig(Model):
    """One run: a teacher, its text, a search space, a constraint file, and how much to spend on each stage.

    With ``prune`` it is a pruning in the place of a search; a constraint file is then asked for its workloads only.
    """

    run: str = Field(description="the folder that everything is written to")
    teacher: str = Field("demo", description="a Hugging Face folder, a hub id, org/name@revision, or demo")
    prune: PruneConfig | None = Field(None, description="uniform width and depth pruning, in the place of a search")
    constraints: str | None = Field(
        None, validate_default=True, description="what the student must fit: a file, or the name of a shipped one"
    )
    space: str | None = Field(None, description="the variants on offer: a file, or a shipped one (default demo)")
    widths: WidthsConfig | None = Field(None, description="hidden sizes to choose from: a search for each")
    original: str | None = Field(
        None,
        description="of a search that widths made: the teacher before it was pruned, which percentages, scores and KL "
        "are of",
    )
    seed: Natural = Field(0, description="of all that is random")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="what computes")
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="what trains and scores: bf16 where it is fast, unless said otherwise"
    )
    memory_budget_gib: PositiveFloat | None = Field(
        None, description="what init, distill and score may take on the device (default: most of what is free)"
    )
    data: DataConfig = Field(DataConfig(), description="the text")
    init: InitConfig = Field(InitConfig(), description="starting points of the variants")
    distill: DistillConfig = Field(DistillConfig(), description="block-wise local distillation")
    score: ScoreConfig = Field(ScoreConfig(), description="how much worse the model gets with each variant")
    additivity: AdditivityConfig = Field(AdditivityConfig(), description="puzzle additivity")
    profile: ProfileConfig = Field(ProfileConfig(), description="where times come from")
    refine: RefineConfig = Field(RefineConfig(), description="the search past sums of scores")
    tournament: TournamentConfig = Field(
        TournamentConfig(), description="the best answers compete in a short distillation"
    )
    kd: KdConfig = Field(KdConfig(), description="global distillation of the student")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="the final comparison")
    export: ExportConfig = Field(ExportConfig(), description="the formats that the student is written in")
    generate: GenerateConfig = Field(GenerateConfig(), description="puzzle generate-data")
    steps: tuple[dict[str, Any], ...] = Field(
        (), description="a chain: each step what it changes of this config, its teacher the student of the one before"
    )

    @field_validator("constraints")
    @classmethod
    def _limited(cls, constraints: str | None, info: ValidationInfo) -> str | None:
        if constraints is None and "prune" in info.data and info.data["prune"] is None:  # not there: a mistake in it
            raise PydanticCustomError("missing", "a search needs limits")
        return constraints

    @field_validator("widths")
    @classmethod
    def _of_a_search(cls, widths: WidthsConfig | None, info: ValidationInfo) -> WidthsConfig | None:
        if widths is not None and info.data.get("prune") is not None:
            raise ValueError("widths are of a search; a pruning takes prune.hidden_size, or several in prune.grid")
        return widths

    @field_validator("space")
    @classmethod
    def _one_way(cls, space: str | None, info: ValidationInfo) -> str | None:
        if space is not None and info.data.get("prune") is not None:
            raise ValueError("a run is a search (space) or a pruning (prune), not both; leave one out")
        return space
