"""The other files that users write: search space, profiling grid, constraints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from puzzle.config.fields import (
    LARGEST,
    PERCENTAGE,
    Fraction,
    Model,
    Name,
    Natural,
    Positive,
    PositiveFloat,
    Size,
    one_or_more,
)
from puzzle.formats import FORMATS
from puzzle.types import Target


class LayerSpaceFile(Model):
    attention: tuple[str, ...] | None = Field(None, description="this layer's attention variants")
    ffn: tuple[str, ...] | None = Field(None, description="this layer's FFN variants")


class FusionFile(Model):
    max_layers: Annotated[int, Field(ge=2, strict=True, description="of how many consecutive layers at most")]
    ffn: tuple[str, ...] = Field(
        ("keep",),
        min_length=1,
        description="which of the FFN variants may be fused, all of a run alike: keep, narrow-N, narrow-50%",
    )


class SpaceFile(Model):
    """A search space: variant names per part (variants.py), for all layers and, in ``layers``, other ones for some."""

    attention: tuple[str, ...] = Field(
        description="variants of every attention: keep, gqa-K, gqa-*, window-W, window-W-sinks-S, linear, skip"
    )
    ffn: tuple[str, ...] = Field(
        description="variants of every FFN: keep, narrow-N, narrow-50%, experts-N, active-K, linear, skip"
    )
    ffn_multiple_of: Positive | None = Field(
        None, description="what percentages of the FFN's width are rounded to (default: what hardware likes)"
    )
    layers: dict[int, LayerSpaceFile] = Field(
        {}, description="other variants for single layers, by their numbers from 0"
    )
    pairs: bool = Field(False, description="attention and FFN of a layer are trained, scored and chosen together")
    runs: Natural = Field(0, description="offer leaving out up to so many consecutive layers whole, scored as one")
    fusion: FusionFile | None = Field(
        None,
        description="offer the FFNs of consecutive layers in parallel, as a single one, without the attentions between",
    )


class GridFile(Model):
    """What ``profile`` measures: every batch size with every prompt length, and with every context length in decode."""

    batch_sizes: tuple[Positive, ...] = Field(description="every one of them is measured")
    prefill_tokens: tuple[Positive, ...] = Field(description="prompt lengths, at every batch size")
    decode_context_tokens: tuple[Positive, ...] = Field(
        description="tokens in the KV cache when one more is made, at every batch size"
    )
    repeats: Positive = Field(20, description="rounds of timing")


class WorkloadFile(Model):
    isl: Size = Field(description="prompt tokens of a request")
    osl: Size = Field(description="generated tokens of a request")
    batch_size: Annotated[
        Annotated[Size, Tag("<size>")] | Annotated[tuple[Size, ...], Tag("<sizes>")],
        Discriminator(lambda given: "<sizes>" if isinstance(given, list | tuple) else "<size>"),
    ] = Field(1, description="requests at once; of a list the search takes the best")
    weights: Name = Field("bf16", description=f"dtype of the weights: {', '.join(FORMATS)}")
    kv: Name = Field("bf16", description="dtype of the KV cache")
    device: Name = Field("cpu", description="where the times are measured or estimated for, e.g. h100")
    tp: Size = Field(1, description="GPUs that share the model (tensor parallelism); memory is per GPU")
    runtime: Name = Field("transformers", description="the serving program")


def _amount(given: Any) -> Any:
    """One message where two kinds of value are allowed, in place of one for each."""
    number = isinstance(given, int | float) and not isinstance(given, bool) and abs(given) <= LARGEST
    if number or (isinstance(given, str) and PERCENTAGE.fullmatch(given) and float(given.rstrip("% ")) <= LARGEST):
        return given
    raise ValueError('give a number in the unit that the metric is named by, or a percentage of the teacher\'s: "75%"')


Amount = Annotated[
    float | str,
    BeforeValidator(_amount),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": -LARGEST, "maximum": LARGEST},
                {
                    "type": "string",
                    "pattern": f"^{PERCENTAGE.pattern}$",
                    "description": "percent of the teacher's own",
                },
            ]
        }
    ),
]


class BoundFile(Model):
    """Bounds on one metric; a bare scalar in the file is read in the metric's natural direction."""

    min: Amount | None = Field(None, description="at least")
    max: Amount | None = Field(None, description="at most")
    eq: Amount | None = Field(None, description="exactly; of whole numbers only")

    @model_validator(mode="after")
    def _some_bound(self) -> BoundFile:
        if self.min is None and self.max is None and self.eq is None:
            raise ValueError("give at least one of min, max, eq")
        if type(self.min) is type(self.max) and self.min is not None and self.max is not None:
            lower, upper = (float(str(amount).rstrip("% ")) for amount in (self.min, self.max))
            if lower > upper:
                raise ValueError(f"min {self.min} is above max {self.max}: nothing can be both")
        return self


class ValuesFile(Model):
    """One search for each of ``values``, each read as a bare scalar would be (search/fan_out.py)."""

    values: tuple[Amount, ...] = Field(description="one search for each")

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and (others := [str(key) for key in given if key != "values"]):
            raise ValueError(f"values stand alone; leave out {', '.join(others)}")
        return given

    @field_validator("values")
    @classmethod
    def _some_values(cls, values: tuple[Amount, ...]) -> tuple[Amount, ...]:
        if not values or len(set(values)) < len(values):
            raise ValueError("give at least one value, and none twice")
        return values


class SolutionsFile(Model):
    count: Positive = Field(1, description="how many")
    min_difference: Fraction = Field(0.2, description="share of the sites in which each differs from every other")


class SolverFile(Model):
    """``gap`` is (best found - bound) / best found. The limit is of one search, all its solves together."""

    gap: Fraction = Field(
        1e-9, description="relative distance between the best answer found and the bound at which it stops"
    )
    time_limit_s: PositiveFloat | None = Field(
        None, le=1e9, description="seconds of one search after which it stops with the best answer found"
    )


def _kind_of_limit(given: Any) -> str:
    if isinstance(given, Mapping | BaseModel):
        return "<values>" if "values" in dict(given) else "<bounds>"
    return "<amount>"


LimitFile = Annotated[
    Annotated[Amount, Tag("<amount>")] | Annotated[ValuesFile, Tag("<values>")] | Annotated[BoundFile, Tag("<bounds>")],
    Discriminator(_kind_of_limit),
]


class ConstraintFile(Model):
    """What the student must fit, as written; what the metrics mean is ``puzzle.search.constraints``' business."""

    workloads: dict[Name, WorkloadFile] = Field({}, description="what is served, by names of your own")
    constraints: dict[Name, LimitFile] = Field(
        description="bounds: metric, or workload.metric; a number, a percentage of the teacher's own value (75%), "
        "{min, max, eq}, or {values: [...]} for one search each. Without a workload: every workload"
    )
    serve_on: Annotated[tuple[Target, ...], *one_or_more({"enum": [*get_args(Target)]})] = Field(
        (), description="only variants that all these runtimes can load"
    )
    objective: str = Field(
        "kl_nats",
        description="the score whose sum is made as small as possible; or a cost such as chat.e2e_ms, while "
        "constraints bound such a sum",
    )
    solutions: SolutionsFile = Field(SolutionsFile(), description="how many different answers")
    solver: SolverFile = Field(
        SolverFile(), description="when the solver may stop before its answer is proven the best"
    )
