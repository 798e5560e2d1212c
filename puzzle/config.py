"""What may stand in the files that users write: run configuration, constraint file, search space, profiling grid.

Frozen pydantic models; unknown keys are errors. yamlfiles.py reads files into them; editors show the descriptions
(schema.py).
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
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from puzzle.formats import FORMATS
from puzzle.types import Format, Target

Positive = Annotated[int, Field(gt=0, strict=True)]
Size = Annotated[int, Field(gt=0, le=10**9, strict=True)]  # of a workload
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(ge=0)]


LARGEST = 1e18  # of any amount in a constraint file: beyond what any model or machine has
_PERCENTAGE = re.compile(r"\d+(\.\d+)?\s*%", re.ASCII)


def _printable(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("give a name, in printable characters")
    return text


Name = Annotated[str, AfterValidator(_printable)]


Tracker = Literal["tensorboard", "wandb", "trackio"]


def _one_or_more(item: dict[str, Any]) -> tuple[BeforeValidator, WithJsonSchema]:
    """What takes one item, or a list of them; ``item`` is its schema."""
    schema = {"anyOf": [item, {"type": "array", "items": item}]}
    return BeforeValidator(lambda given: [given] if isinstance(given, str) else given), WithJsonSchema(schema)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(_Model):
    """One source of documents."""

    path: str | None = Field(
        None, description="a .txt, .md, .py, .jsonl, .parquet file (.gz too), a folder of them, or demo"
    )
    dataset: str | None = Field(None, description="a data set that the datasets library can stream")
    name: str | None = Field(None, description="the data set's configuration")
    split: str | None = Field(None, description="the data set's split")
    revision: str | None = Field(None, description="the data set's revision")
    data_files: Annotated[tuple[str, ...], *_one_or_more({"type": "string"})] = Field(
        (), description="the data set's files"
    )
    column: str | None = Field(None, description="the column of text (default text)")
    messages: str | None = Field(
        None, description="the column of chat messages [{role, content}, …], in the place of text"
    )
    weight: PositiveFloat | None = Field(None, description="share of the tokens")

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

    train: Positive = Field(description="tokens to train on")
    score: Positive = Field(description="tokens to score variants on")
    select: Positive = Field(description="tokens to choose between candidates on")
    report: Positive = Field(description="tokens for the figures at the end")


class DataConfig(_Model):
    """``sequence_tokens`` and ``within_documents`` act when tokens are read: changing them tokenises nothing anew."""

    text: str = Field("demo", description="demo, a file (.txt, .md, .py, .jsonl, .parquet) or a folder")
    sources: tuple[SourceConfig, ...] = Field(
        (), description="several, mixed by weight (shares of tokens, in every split), in the place of text"
    )
    tokens: TokensConfig | None = Field(
        None, description="how many to take for each split (default: all there are, as far as weights allow)"
    )
    sequence_tokens: Positive = Field(256, description="length of a training or scoring sequence")
    within_documents: bool = Field(False, description="attention does not cross from one document to the next")

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
    """``start: best`` takes, variant by variant, the one with the lowest loss on windows of train that are held out."""

    start: Literal["best", "paper"] = Field(
        "best", description="the best of all starting points on held-out windows, or the paper's"
    )
    sequences: Positive = Field(128, description="how many of train they are made from")


class DistillConfig(_Model):
    """BLD. Of a ``nested`` FFN only the widths in the space are drawn: one more means training it anew.

    ``patience`` counts checks, 20 in a whole training, and getting better means by 0.1 %.
    """

    tokens: Natural = Field(1_000_000, description="per variant; 0 leaves the starting points as they are")
    batch_size: Positive = Field(8, description="sequences in a step")
    learning_rate: PositiveFloat = Field(5e-4, description="at its highest")
    weight_decay: NonNegative = Field(0.1, description="of AdamW")
    warmup_fraction: Fraction = Field(0.05, description="share of the steps until the rate is at its highest")
    loss_at: Literal["layer", "site"] = Field(
        "layer", description="the layer's output (the paper's), or what the site adds"
    )
    loss: Literal["mse", "cosine"] = Field("mse", description="between activations")
    patience: Positive | None = Field(
        None, description="stop a variant after so many checks without getting better; null trains all to the end"
    )
    nested: bool = Field(False, description="one FFN per site holds all its narrow variants")
    residual: Literal["auto", "memory", "disk", "recompute"] = Field(
        "auto", description="where the teacher's activations between layers are kept"
    )


OBJECTIVES = {  # name in the file: name of the score
    "kl_nats": "kl",
    "ce_delta_nats": "ce_delta",
    "hidden_distance": "hidden_distance",
}
BUILT_IN = {"kl", "ce_delta", "agreement", "hidden_distance"}  # scores that are no tasks of the user's own


def score_of(objective: str) -> str:
    """The score that an objective adds up: one of ours, or a task of the user's own by its name."""
    return OBJECTIVES.get(objective, objective)


class ScoreConfig(_Model):
    """``until_se`` adds sequences, twice as many each time, where two variants of a site are not told apart, until the
    standard error of their difference is below it. ``tasks``: see scoring/exact.py, Task.
    """

    mode: Literal["auto", "exact", "one-pass"] = Field(
        "auto",
        description="measure all variants, or estimate them and measure what decides; auto: exact up to 30 layers",
    )
    sequences: Positive = Field(32, description="how many of score")
    until_se: PositiveFloat | None = Field(
        None, description="add sequences until a site's variants are told apart, or so close (nats)"
    )
    tasks: dict[str, Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]] = Field(
        {}, description="scores of your own: name to module:function"
    )

    @field_validator("tasks")
    @classmethod
    def _names_of_their_own(cls, tasks: dict[str, str]) -> dict[str, str]:
        if taken := sorted(tasks.keys() & {*OBJECTIVES, *BUILT_IN}):
            raise ValueError(f"{taken[0]} is a score already; choose another name")
        return tasks


class AdditivityConfig(_Model):
    """Near-optimal and random architectures, mild and hard, in equal numbers."""

    architectures: Positive = Field(120, description="how many are evaluated truly")


class RefineConfig(_Model):
    """The search past sums of scores, by true evaluations on ``evaluate.sequences`` of select."""

    evaluations: Natural = Field(
        0, description="whole architectures that are evaluated truly; 0: the search's answer is taken as it is"
    )
    seed: Natural = Field(0, description="of what is random in it")


class TournamentConfig(_Model):
    """The best answers of the search distilled for a short while each: the order that scores predict moves early on.

    Half of them are left out each time, and those that go on are distilled twice as far, until one is left.
    """

    candidates: Natural = Field(
        0, description="how many of the best answers compete (constraint file: solutions: {count: …}); 0: no tournament"
    )
    tokens: Positive = Field(500_000, description="of GKD until the first comparison; twice as many until each later")

    @field_validator("candidates")
    @classmethod
    def _none_or_several(cls, candidates: int) -> int:
        if candidates == 1:
            raise ValueError("one candidate alone cannot compete; give at least 2, or 0")
        return candidates


class VllmConfig(_Model):
    """vLLM's own environment, and how it is started."""

    python: str = Field(description="the interpreter of vLLM's own environment")
    tp: Positive = Field(1, description="tensor parallelism")
    num_layers: Positive | None = Field(None, description="of the models that are measured; default the teacher's")
    max_batched_tokens: Positive = Field(8192, description="of all prompts in one forward")
    kv_cache_gib: PositiveFloat | None = Field(None, description="default: as much as vLLM takes")


class ProfileConfig(_Model):
    """Where times come from, and how they are used.

    A ``table`` of this teacher's shapes on any device of the sheet makes estimates better: their efficiency is fitted.
    ``safety`` counts once `puzzle fit-costs` has measured whole models; 1.64 lets one in twenty miss.
    """

    backend: Literal["measured", "vllm", "roofline", "imported"] = Field(
        "measured", description="measured here, in vllm, estimated from a data sheet (roofline), or imported from table"
    )
    grid: str = Field("demo", description="what is measured: a file, or the name of a shipped one")
    weights: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="the dtype that is timed, of the KV cache, too; auto: bf16 on a GPU, else fp32"
    )
    compile: bool = Field(False, description="under torch.compile; workloads then name runtime transformers-compiled")
    table: str | None = Field(None, description="CSV or JSON of costs: imported, or what estimates are fitted to")
    vllm: VllmConfig | None = Field(None, description="where vLLM is, and how it is started")
    stand_in: dict[str, str] = Field(
        {}, description="devices or dtypes whose times are taken from another's, e.g. {h100: h200}"
    )
    fit_models: Annotated[int, Field(ge=3)] = Field(
        6, description="how many random models puzzle fit-costs measures beside the teacher"
    )
    safety: NonNegative = Field(
        1.64, description="standard errors of predicted times that the search keeps clear of limits"
    )

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
    """GKD. Loss: ``kl_weight * KL(logits) + lm_weight * CE + balance * (cosine_weight * sum over layers of (1 - cos) +
    mse_weight * sum over layers of the squared error relative to the teacher's square)``.

    ``divergence``: forward is KL(teacher || student), reverse the other way round, jsd their symmetric mean.
    """

    tokens: Natural = Field(10_000_000, description="0 leaves the student as it was built")
    max_epochs: PositiveFloat | None = Field(
        None, description="how often train may be gone through; tokens that take more are refused (default: any)"
    )
    batch_size: Positive = Field(8, description="sequences in a step, over all ranks together")
    micro_batch_size: Positive | None = Field(
        None, description="sequences that a device takes at a time, summing gradients (default: its whole share)"
    )
    learning_rate: PositiveFloat = Field(5e-4, description="at its highest")
    min_learning_rate: NonNegative = Field(5e-5, description="at the end")
    warmup_steps: Natural = Field(40, description="until the rate is at its highest")
    weight_decay: NonNegative = Field(0.1, description="of AdamW")
    kl_weight: NonNegative = Field(1.0, description="of the divergence between the predictions")
    divergence: Literal["forward", "reverse", "jsd"] = Field("forward", description="KL(teacher || student) or other")
    temperature: PositiveFloat = Field(1.0, description="that both models' logits are divided by, in the divergence")
    cosine_weight: NonNegative = Field(1.0, description="of 1 - cos, summed over the layers")
    mse_weight: NonNegative = Field(
        0.0, description="of the squared error relative to the teacher's square, summed over the layers"
    )
    match_embedding: bool = Field(False, description="the embedding's output is compared as a layer's is")
    lm_weight: NonNegative = Field(0.0, description="of the language model's cross-entropy")
    balance: Literal["fixed", "dynamic"] = Field(
        "fixed",
        description="dynamic: the layers' part is scaled to be as large as that of the predictions (as measured at the "
        "step before)",
    )
    signal: Literal["online", "hidden", "sampled"] = Field(
        "online",
        description="the teacher beside the student; or what it said before, on disk: its final hidden states "
        "(exact), or tokens drawn from its predictions (an unbiased estimate of forward KL)",
    )
    signal_samples: Positive = Field(64, description="tokens drawn per position")
    checkpoint_activations: bool = Field(False, description="compute layers again going backward: slower, less memory")
    checkpoint_steps: Positive = Field(100, description="how often it can be continued from")
    report_to: Annotated[tuple[Tracker, ...], *_one_or_more({"enum": [*get_args(Tracker)]})] | None = Field(
        None, description="where losses are shown beside kd_log.jsonl (default: tensorboard if it is installed)"
    )

    @property
    def compares_layers(self) -> bool:
        return bool(self.cosine_weight or self.mse_weight)

    @property
    def needs_teacher(self) -> bool:
        """Not where the language model's loss is alone."""
        return bool(self.kl_weight) or self.compares_layers

    @model_validator(mode="after")
    def _some_loss(self) -> KdConfig:
        if not self.needs_teacher and not self.lm_weight:
            raise ValueError("all weights are 0; give at least one of kl_weight, cosine_weight, mse_weight, lm_weight")
        if self.match_embedding and not self.compares_layers:
            raise ValueError("match_embedding needs a cosine_weight or an mse_weight above 0")
        if self.balance == "dynamic" and not (self.compares_layers and (self.kl_weight or self.lm_weight)):
            raise ValueError("balance: dynamic needs a loss of the predictions (kl_weight) and one of the layers")
        if self.signal != "online" and (self.compares_layers or not self.kl_weight):
            raise ValueError(f"signal: {self.signal} is of predictions alone; set cosine_weight and mse_weight to 0")
        if self.signal == "sampled" and self.divergence != "forward":
            raise ValueError("signal: sampled estimates forward KL alone; set divergence: forward")
        return self


class GenerateConfig(_Model):
    """`puzzle generate-data`: text of the teacher's own, to distil on."""

    documents: Positive = Field(1024, description="how many the teacher writes")
    prompts: SourceConfig | None = Field(
        None, description="texts or conversations that it goes on from; null: it begins with its first token"
    )
    prompt_tokens: Positive = Field(32, description="of each text, from its beginning, that are given")
    max_new_tokens: Positive = Field(512, description="that it writes, unless it ends before")
    temperature: NonNegative = Field(1.0, description="that its logits are divided by; 0: always the likeliest token")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of the probability that may be drawn")
    batch_size: Positive = Field(32, description="documents written at a time")

    @field_validator("prompts")
    @classmethod
    def _unweighted(cls, prompts: SourceConfig | None) -> SourceConfig | None:
        if prompts is not None and prompts.weight is not None:
            raise ValueError("prompts are a single source; leave out its weight")
        return prompts


Aggregation = Literal["mean", "l2", "max", "var"]
LayersBy = Literal["block-importance", "loss", "contiguous"]


class ImportanceConfig(_Model):
    """How what is seen of single tokens becomes one number: first over a sequence's tokens, then over sequences."""

    sequence: Aggregation = Field("mean", description="over the tokens of a sequence")
    batch: Aggregation = Field("l2", description="over the sequences")


def _width(given: Any) -> Any:
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    if isinstance(given, str) and _PERCENTAGE.fullmatch(given) and 0 < float(given.rstrip("% ")) <= 100:
        return given
    raise ValueError('give a whole number, or a percentage of the teacher\'s: "75%"')


Width = Annotated[
    int | str,
    BeforeValidator(_width),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^{_PERCENTAGE.pattern}$"}]}
    ),
]


def _layers_by(given: Any) -> Any:
    if given in get_args(LayersBy):
        return given
    numbers = isinstance(given, list | tuple) and [isinstance(one, int) and one >= 0 for one in given]
    if numbers and all(numbers) and len(set(given)) == len(given):
        return tuple(given)
    raise ValueError(f"give one of {', '.join(get_args(LayersBy))}, or a list of the layers to drop, numbered from 0")


class PruneConfig(_Model):
    """The same sizes in every layer (Minitron, 2407.14679); what is not named stays as the teacher has it.

    ``init.start`` says what becomes of the weights that stay: refitted, or the paper's; ``init.sequences`` on how much.
    """

    hidden_size: Width | None = Field(None, description="channels of the residual stream: a number, or 75%")
    intermediate_size: Width | None = Field(None, description="channels of every FFN")
    num_attention_heads: Width | None = Field(None, description="query heads of every attention")
    num_key_value_heads: Width | None = Field(None, description="KV heads; they go together with their query heads")
    num_layers: Width | None = Field(None, description="how many layers stay")
    layers_by: Annotated[
        str | tuple[int, ...],
        BeforeValidator(_layers_by),
        WithJsonSchema(
            {
                "anyOf": [
                    {"enum": [*get_args(LayersBy)]},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                ]
            }
        ),
    ] = Field(
        "block-importance",
        description="which layers go: those that change the stream least, those whose loss alone is least, the "
        "contiguous run whose loss is least, or a list of their numbers from 0",
    )
    layers_metric: str = Field("kl", description="what loss is: kl, ce_delta, or one of score.tasks, on split score")
    importance: ImportanceConfig = Field(ImportanceConfig(), description="how channels and heads are ranked")

    @model_validator(mode="after")
    def _some_layers(self) -> PruneConfig:
        if self.layers_by in ("loss", "contiguous") and self.num_layers is None:
            raise ValueError(f"layers_by: {self.layers_by} needs num_layers: how many stay")
        return self


class EvaluateConfig(_Model):
    """At least two sequences: one has no standard error."""

    sequences: Annotated[int, Field(ge=2)] = Field(64, description="how many of report")


class ExportConfig(_Model):
    """The formats that the student is written in."""

    targets: Annotated[tuple[Format, ...] | None, *_one_or_more({"enum": [*get_args(Format)]})] = Field(
        None, description="which (default: hf, and those that the runtimes in serve_on read)"
    )
    gguf_type: Literal["F32", "F16", "BF16", "Q8_0"] | None = Field(
        None, description="of matrices in a GGUF file (default: as the teacher's are stored)"
    )


class RunConfig(_Model):
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

    @field_validator("space")
    @classmethod
    def _one_way(cls, space: str | None, info: ValidationInfo) -> str | None:
        if space is not None and info.data.get("prune") is not None:
            raise ValueError("a run is a search (space) or a pruning (prune), not both; leave one out")
        return space


class LayerSpaceFile(_Model):
    attention: tuple[str, ...] | None = Field(None, description="this layer's attention variants")
    ffn: tuple[str, ...] | None = Field(None, description="this layer's FFN variants")


class FusionFile(_Model):
    max_layers: Annotated[int, Field(ge=2, strict=True, description="of how many consecutive layers at most")]
    ffn: tuple[str, ...] = Field(
        ("keep",),
        min_length=1,
        description="which of the FFN variants may be fused, all of a run alike: keep, narrow-N, narrow-50%",
    )


class SpaceFile(_Model):
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


class GridFile(_Model):
    """What ``profile`` measures: every batch size with every prompt length, and with every context length in decode."""

    batch_sizes: tuple[Positive, ...] = Field(description="every one of them is measured")
    prefill_tokens: tuple[Positive, ...] = Field(description="prompt lengths, at every batch size")
    decode_context_tokens: tuple[Positive, ...] = Field(
        description="tokens in the KV cache when one more is made, at every batch size"
    )
    repeats: Positive = Field(20, description="rounds of timing")


class WorkloadFile(_Model):
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


class ValuesFile(_Model):
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


class SolutionsFile(_Model):
    count: Positive = Field(1, description="how many")
    min_difference: Fraction = Field(0.2, description="share of the sites in which each differs from every other")


class SolverFile(_Model):
    """``gap`` is (best found - bound) / best found. The limit is of one search, all its solves together."""

    gap: Fraction = Field(
        1e-9, description="relative distance between the best answer found and the bound at which it stops"
    )
    time_limit_s: PositiveFloat | None = Field(
        None, description="seconds of one search after which it stops with the best answer found"
    )


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

    workloads: dict[Name, WorkloadFile] = Field({}, description="what is served, by names of your own")
    constraints: dict[Name, LimitFile] = Field(
        description="bounds: metric, or workload.metric; a number, a percentage of the teacher's own value (75%), "
        "{min, max, eq}, or {values: [...]} for one search each. Without a workload: every workload"
    )
    serve_on: Annotated[tuple[Target, ...], *_one_or_more({"enum": [*get_args(Target)]})] = Field(
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
