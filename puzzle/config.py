"""What may stand in the files that users write: run configuration, constraint file, search space, profiling grid.

Frozen pydantic models; unknown keys are errors. yamlfiles.py reads files into them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from puzzle.types import Target

Positive = Annotated[int, Field(gt=0, strict=True)]
Size = Annotated[int, Field(gt=0, le=10**9, strict=True)]  # of a workload
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


LARGEST = 1e18  # of any amount in a constraint file: beyond what any model or machine has
_PERCENTAGE = re.compile(r"\d+(\.\d+)?\s*%", re.ASCII)


def _printable(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("give a name, in printable characters")
    return text


Name = Annotated[str, AfterValidator(_printable)]


def _one_or_more(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(_Model):
    """One source of documents, in a ``column`` of text (default ``text``), or one of ``messages`` [{role, content}, …].

    ``path``: a .txt, .md, .py, .jsonl, .parquet file (.gz too), a folder of them, or ``demo``. ``dataset``: whatever
    the `datasets` library can stream, with its ``name``, ``split``, ``revision`` and ``data_files``.
    """

    path: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    data_files: Annotated[
        tuple[str, ...],
        BeforeValidator(_one_or_more),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    ] = ()
    column: str | None = None
    messages: str | None = None
    weight: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give one of path, dataset")
        if self.path is not None and (self.name or self.split or self.revision or self.data_files):
            raise ValueError("name, split, revision and data_files are for a dataset, not for a path")
        if self.column is not None and self.messages is not None:
            raise ValueError("give one of column, messages")
        return self

    @property
    def label(self) -> str:
        """For people: the file's name, or the data set's with its configuration."""
        name = Path(self.path).name if self.path is not None else "/".join(filter(None, (self.dataset, self.name)))
        return f"{name} ({', '.join(self.data_files)})" if self.data_files else name


class TokensConfig(_Model):
    """How many tokens to take for each split."""

    train: Positive
    score: Positive
    select: Positive
    report: Positive


class DataConfig(_Model):
    """``text``: ``demo``, a file or a folder; or ``sources``: several, mixed by weight (shares of tokens, every split).

    Without ``tokens`` everything there is is taken, as far as the weights allow. ``sequence_tokens`` and
    ``within_documents`` (attention does not cross from one document to the next) act when tokens are read: changing
    them tokenises nothing anew.
    """

    text: str = "demo"
    sources: tuple[SourceConfig, ...] = ()
    tokens: TokensConfig | None = None
    sequence_tokens: Positive = 256
    within_documents: bool = False

    @model_validator(mode="before")
    @classmethod
    def _text_or_sources(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("sources"):
            if given.get("text"):
                raise ValueError("give text or sources, not both")
            return {**given, "text": ""}
        return given

    @model_validator(mode="after")
    def _enough_said(self) -> DataConfig:
        if not self.text and not self.sources:
            raise ValueError("give text or sources")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none of them")
        if self.tokens is not None and len(self.sources) > 1 and not any(weighted):
            raise ValueError("with tokens, give every source a weight: its share of them")
        if self.tokens is None and any(source.dataset is not None for source in self.sources):
            raise ValueError("a dataset is streamed and may never end; say how much to take: tokens: {train: …, …}")
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """``sources``, or ``text`` as the only one."""
        return self.sources or (SourceConfig(path=self.text),)

    @property
    def label(self) -> str:
        """For people: what the text is."""
        return ", ".join(source.label for source in self.all_sources)


class InitConfig(_Model):
    """``sequences`` of train are what starts are made from; ``start: best`` takes, variant by variant, the one with the
    lowest loss on windows of train that are held out."""

    start: Literal["best", "paper"] = "best"
    sequences: Positive = 128


class DistillConfig(_Model):
    """BLD. ``tokens`` per variant; 0 leaves the starting points as they are. Of a ``nested`` FFN only the widths in the
    space are drawn: one more means training it anew.

    ``patience``: a variant stops after so many checks (20 in a whole training) without getting better by 0.1 %; null
    trains all to the end. ``nested``: one FFN per site holds all its ``narrow`` variants. ``residual``: where the
    teacher's activations between layers are kept.
    """

    tokens: Annotated[int, Field(ge=0)] = 1_000_000
    batch_size: Positive = 8
    learning_rate: PositiveFloat = 5e-4
    weight_decay: NonNegative = 0.1
    warmup_fraction: Fraction = 0.05
    loss_at: Literal["layer", "site"] = "layer"
    loss: Literal["mse", "cosine"] = "mse"
    patience: Positive | None = None
    nested: bool = False
    residual: Literal["auto", "memory", "disk", "recompute"] = "auto"


OBJECTIVES = {  # name in the file: name of the score
    "kl_nats": "kl",
    "ce_delta_nats": "ce_delta",
    "hidden_distance": "hidden_distance",
}
BUILT_IN = {"kl", "ce_delta", "agreement", "hidden_distance"}  # scores that are no tasks of the user's own


class ScoreConfig(_Model):
    """``mode``: every variant on the whole model (exact), or estimated from the teacher's gradients (one-pass), while
    what decides a search is still measured exactly; auto: exact up to 30 layers.
    ``until_se`` (nats): where two variants of a site are not told apart, sequences are added, twice as many each
    time, until the standard error of their difference is below it. ``tasks``: metrics of the user's own by name,
    ``module:function`` (scoring/exact.py, Task).
    """

    mode: Literal["auto", "exact", "one-pass"] = "auto"
    sequences: Positive = 32
    until_se: PositiveFloat | None = None
    tasks: dict[str, Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]] = {}

    @field_validator("tasks")
    @classmethod
    def _names_of_their_own(cls, tasks: dict[str, str]) -> dict[str, str]:
        if taken := sorted(tasks.keys() & {*OBJECTIVES, *BUILT_IN}):
            raise ValueError(f"{taken[0]} is a score already; choose another name")
        return tasks


class AdditivityConfig(_Model):
    """How many architectures are evaluated truly: near-optimal and random ones, mild and hard, in equal numbers."""

    architectures: Positive = 120


class RefineConfig(_Model):
    """The search past sums of scores: how many whole architectures are evaluated truly, on ``evaluate.sequences`` of
    select. 0: what the search finds is taken as it is."""

    evaluations: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0


class VllmConfig(_Model):
    """vLLM's own environment, and how it is started.

    ``python``: the interpreter there. ``num_layers``: of the models that are measured, default the teacher's.
    ``kv_cache_gib``: default as much as vLLM takes.
    """

    python: str
    tp: Positive = 1
    num_layers: Positive | None = None
    max_batched_tokens: Positive = 8192
    kv_cache_gib: PositiveFloat | None = None


class ProfileConfig(_Model):
    """Where times come from, and how they are used.

    ``backend``: ``measured`` here, on the ``grid``; ``vllm``, as whole models on the grid; ``roofline``, estimated from
    a sheet of the hardware for whatever the constraint file asks (profiling/roofline.py); ``imported`` from ``table``,
    a CSV or JSON file of Cost records. A ``table`` of this teacher's shapes on any device of the sheet makes estimates
    better: their efficiency is fitted.
    ``weights``: the dtype that is timed (KV cache likewise); ``auto`` is bf16 on a GPU, fp32 elsewhere. ``compile``:
    under torch.compile, which workloads name as runtime transformers-compiled.
    ``stand_in``: devices or dtypes whose times are to be taken from another's, as in ``{h100: h200}``.
    ``safety``: the search keeps so many standard errors of predicted times clear of limits, once `puzzle fit-costs`
    has measured whole models (``fit_models`` at random, beside the teacher); 1.64 lets one in twenty miss.
    """

    backend: Literal["measured", "vllm", "roofline", "imported"] = "measured"
    grid: str = "demo"
    weights: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    table: str | None = None
    vllm: VllmConfig | None = None
    stand_in: dict[str, str] = {}
    fit_models: Annotated[int, Field(ge=3)] = 6
    safety: NonNegative = 1.64

    @model_validator(mode="after")
    def _what_the_backend_needs(self) -> ProfileConfig:
        if self.backend == "imported" and self.table is None:
            raise ValueError("backend: imported needs a table")
        if self.backend in ("measured", "vllm") and self.table is not None:
            raise ValueError("a table is for backend: imported or roofline")
        if self.backend == "vllm" and self.vllm is None:
            raise ValueError("backend: vllm needs vllm: {python: …}, the interpreter of the environment it is in")
        return self


class KdConfig(_Model):
    """GKD. Loss: ``kl_weight * KL(logits) + cosine_weight * sum over layers of (1 - cos) + lm_weight * CE``."""

    tokens: Annotated[int, Field(ge=0)] = 10_000_000
    batch_size: Positive = 8
    learning_rate: PositiveFloat = 5e-4
    min_learning_rate: NonNegative = 5e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    weight_decay: NonNegative = 0.1
    kl_weight: NonNegative = 1.0
    cosine_weight: NonNegative = 1.0
    lm_weight: NonNegative = 0.0
    checkpoint_steps: Positive = 100

    @model_validator(mode="after")
    def _some_loss(self) -> KdConfig:
        if not self.kl_weight + self.cosine_weight + self.lm_weight:
            raise ValueError("all weights are 0; give at least one of kl_weight, cosine_weight, lm_weight")
        return self


class EvaluateConfig(_Model):
    """At least two sequences: one has no standard error."""

    sequences: Annotated[int, Field(ge=2)] = 64


class RunConfig(_Model):
    """One run: a teacher, its text, a search space, a constraint file, and how much to spend on each stage.

    ``memory_budget_gib``: what ``init``, ``distill`` and ``score`` may take on the device; by default most of what is
    free.
    """

    run: str
    teacher: str = "demo"
    constraints: str
    space: str = "demo"
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    memory_budget_gib: PositiveFloat | None = None
    data: DataConfig = DataConfig()
    init: InitConfig = InitConfig()
    distill: DistillConfig = DistillConfig()
    score: ScoreConfig = ScoreConfig()
    additivity: AdditivityConfig = AdditivityConfig()
    profile: ProfileConfig = ProfileConfig()
    refine: RefineConfig = RefineConfig()
    kd: KdConfig = KdConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class LayerSpaceFile(_Model):
    attention: tuple[str, ...] | None = None
    ffn: tuple[str, ...] | None = None


class SpaceFile(_Model):
    """A search space: variant names per part (variants.py), for all layers and, in ``layers``, other ones for some.

    Percentages are rounded to ``ffn_multiple_of`` channels (default: what hardware likes, see space.py). ``pairs``: the
    attention and the FFN of a layer are trained, scored and chosen together. ``runs``: leaving out up to so many
    consecutive layers whole is on offer as one item, scored as one.
    """

    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    ffn_multiple_of: Positive | None = None
    layers: dict[int, LayerSpaceFile] = {}
    pairs: bool = False
    runs: Annotated[int, Field(ge=0)] = 0


class GridFile(_Model):
    """What ``profile`` measures: every batch size with every prompt length, and with every context length in decode."""

    batch_sizes: tuple[Positive, ...]
    prefill_tokens: tuple[Positive, ...]
    decode_context_tokens: tuple[Positive, ...]
    repeats: Positive = 20


class WorkloadFile(_Model):
    isl: Size
    osl: Size
    batch_size: Annotated[
        Annotated[Size, Tag("<size>")] | Annotated[tuple[Size, ...], Tag("<sizes>")],
        Discriminator(lambda given: "<sizes>" if isinstance(given, list | tuple) else "<size>"),
    ] = 1
    weights: Name = "bf16"
    kv: Name = "bf16"
    device: Name = "cpu"
    tp: Size = 1
    runtime: Name = "transformers"


def _amount(given: Any) -> Any:
    """One message where two kinds of value are allowed, in place of one for each."""
    number = isinstance(given, int | float) and not isinstance(given, bool) and abs(given) <= LARGEST
    if number or (isinstance(given, str) and _PERCENTAGE.fullmatch(given) and float(given.rstrip("% ")) <= LARGEST):
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
                    "pattern": f"^{_PERCENTAGE.pattern}$",
                    "description": "percent of the teacher's own",
                },
            ]
        }
    ),
]


class BoundFile(_Model):
    """Bounds on one metric; a bare scalar in the file is read in the metric's natural direction."""

    min: Amount | None = None
    max: Amount | None = None
    eq: Amount | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> BoundFile:
        if self.min is None and self.max is None and self.eq is None:
            raise ValueError("give at least one of min, max, eq")
        if type(self.min) is type(self.max) and self.min is not None and self.max is not None:
            lower, upper = (float(str(amount).rstrip("% ")) for amount in (self.min, self.max))
            if lower > upper:
                raise ValueError(f"min {self.min} is above max {self.max}: nothing can be both")
        return self


class ValuesFile(_Model):
    """One search for each of ``values``, each read as a bare scalar would be (search/fan_out.py)."""

    values: tuple[Amount, ...]

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


class SolutionsFile(_Model):
    count: Positive = 1
    min_difference: Fraction = 0.2


def _kind_of_limit(given: Any) -> str:
    if isinstance(given, Mapping | BaseModel):
        return "<values>" if "values" in dict(given) else "<bounds>"
    return "<amount>"


LimitFile = Annotated[
    Annotated[Amount, Tag("<amount>")] | Annotated[ValuesFile, Tag("<values>")] | Annotated[BoundFile, Tag("<bounds>")],
    Discriminator(_kind_of_limit),
]


class ConstraintFile(_Model):
    """What the student must fit, as written; what the metrics mean is ``puzzle.search.constraints``' business."""

    workloads: dict[Name, WorkloadFile] = {}
    constraints: dict[Name, LimitFile]
    serve_on: Annotated[
        tuple[Target, ...],
        BeforeValidator(_one_or_more),
        WithJsonSchema(
            {"anyOf": [{"enum": [*get_args(Target)]}, {"type": "array", "items": {"enum": [*get_args(Target)]}}]}
        ),
    ] = ()
    objective: str = "kl_nats"
    solutions: SolutionsFile = SolutionsFile()
