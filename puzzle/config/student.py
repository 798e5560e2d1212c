"""The student, pruned or put together, distilled, evaluated and exported: sections of the run configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from puzzle.config.fields import PERCENTAGE, Model, Natural, NonNegative, Positive, PositiveFloat, one_or_more
from puzzle.types import Format

Tracker = Literal["tensorboard", "wandb", "trackio"]
TaskName = Annotated[str, Field(pattern=r"^[\w.+-]+$")]  # names files, too


class TournamentConfig(Model):
    """Candidates distilled for a short while each: the order that scores or sizes predict moves early on. They are the
    best answers of the search, or of a pruning the combinations of ``prune.grid``.

    Half of them are left out each time, and those that go on are distilled twice as far, until one is left.
    """

    candidates: Natural = Field(
        0, description="how many compete (of a search, constraint file: solutions: {count: …}); 0: no tournament"
    )
    tokens: Positive = Field(500_000, description="of GKD until the first comparison; twice as many until each later")

    @field_validator("candidates")
    @classmethod
    def _none_or_several(cls, candidates: int) -> int:
        if candidates == 1:
            raise ValueError("one candidate alone cannot compete; give at least 2, or 0")
        return candidates


class KdConfig(Model):
    """GKD. Loss: ``kl_weight * KL(logits) + lm_weight * CE + balance * (cosine_weight * sum over layers of (1 - cos) +
    mse_weight * sum over layers of the squared error relative to the teacher's square)``.

    ``divergence``: forward is KL(teacher || student), reverse the other way round, jsd their symmetric mean.
    """

    tokens: Natural = Field(10_000_000, description="0 leaves the student as it was built")
    teacher: str | None = Field(
        None,
        description="who distils, where not the run's own teacher: a folder, a hub id, or in a chain first, the "
        "teacher before any step; of the same vocabulary",
    )
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
    report_to: Annotated[tuple[Tracker, ...], *one_or_more({"enum": [*get_args(Tracker)]})] | None = Field(
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


Aggregation = Literal["mean", "l2", "max", "var"]
LayersBy = Literal["block-importance", "loss", "contiguous"]


class ImportanceConfig(Model):
    """How what is seen of single tokens becomes one number: first over a sequence's tokens, then over sequences."""

    sequence: Aggregation = Field("mean", description="over the tokens of a sequence")
    batch: Aggregation = Field("l2", description="over the sequences")


def _width(given: Any) -> Any:
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    if isinstance(given, str) and PERCENTAGE.fullmatch(given) and 0 < float(given.rstrip("% ")) <= 100:
        return given
    raise ValueError('give a whole number, or a percentage of the teacher\'s: "75%"')


Width = Annotated[
    int | str,
    BeforeValidator(_width),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^{PERCENTAGE.pattern}$"}]}
    ),
]


def _layers_by(given: Any) -> Any:
    if given in get_args(LayersBy):
        return given
    numbers = isinstance(given, list | tuple) and [isinstance(one, int) and one >= 0 for one in given]
    if numbers and all(numbers) and len(set(given)) == len(given):
        return tuple(given)
    raise ValueError(f"give one of {', '.join(get_args(LayersBy))}, or a list of the layers to drop, numbered from 0")


Widths = tuple[Width, ...]


class PruneGridConfig(Model):
    """Several sizes to choose from (Minitron's lightweight search): the combinations compete in the tournament."""

    params: Width | None = Field(
        None, description="of the whole model: a number, or 60%; only combinations near it compete, the nearest first"
    )
    within: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="how near: a share of params, either way")
    hidden_size: Widths = Field((), description="one or more, each as in prune")
    intermediate_size: Widths = Field((), description="one or more, each as in prune")
    num_attention_heads: Widths = Field((), description="one or more, each as in prune")
    num_key_value_heads: Widths = Field((), description="one or more, each as in prune")
    num_layers: Widths = Field((), description="one or more, each as in prune")

    @property
    def axes(self) -> dict[str, Widths]:
        """What there is to choose from, by the name of the size."""
        sizes = {name: getattr(self, name) for name in type(self).model_fields if name not in ("params", "within")}
        return {name: values for name, values in sizes.items() if values}

    @model_validator(mode="after")
    def _some_choice(self) -> PruneGridConfig:
        if not self.axes:
            raise ValueError("there is nothing to choose from; give lists, like hidden_size: [75%, 87.5%]")
        return self


class PruneConfig(Model):
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
    grid: PruneGridConfig | None = Field(None, description="sizes to choose from, instead of one of each")

    @model_validator(mode="after")
    def _some_layers(self) -> PruneConfig:
        axes = self.grid.axes if self.grid else {}
        if self.layers_by in ("loss", "contiguous") and self.num_layers is None and "num_layers" not in axes:
            raise ValueError(f"layers_by: {self.layers_by} needs num_layers: how many stay")
        if twice := [name for name in axes if getattr(self, name) is not None]:
            raise ValueError(f"{twice[0]} is given in prune and in its grid; give it once")
        return self


class WidthsConfig(Model):
    """Hidden sizes that the search chooses from: for each below the teacher's own, the teacher is pruned to it and
    distilled, and that is what its library, scores and costs are of."""

    sizes: Widths = Field(description='hidden sizes, such as "100%" or 3072')
    tokens: Natural = Field(10_000_000, description="of GKD for the teacher pruned to a size")

    @field_validator("sizes")
    @classmethod
    def _some(cls, sizes: Widths) -> Widths:
        if not sizes:
            raise ValueError('there is nothing to choose from; give sizes, like ["100%", "75%"]')
        return sizes


class EvaluateConfig(Model):
    """At least two sequences: one has no standard error."""

    sequences: Annotated[int, Field(ge=2)] = Field(64, description="how many of report")
    tasks: Annotated[tuple[TaskName, ...], *one_or_more({"type": "string"})] = Field(
        (), description="of the lm-evaluation-harness (pip install 'puzzle-nas[eval]'): tasks or groups, by name"
    )
    task_folder: str | None = Field(None, description="YAML files of tasks of your own")
    task_shots: Natural | None = Field(None, description="examples before each question (default: as the task says)")
    task_questions: Annotated[int, Field(ge=2)] | None = Field(
        None, description="only the first so many of each task (default: all)"
    )


class ExportConfig(Model):
    """The formats that the student is written in."""

    targets: Annotated[tuple[Format, ...] | None, *one_or_more({"enum": [*get_args(Format)]})] = Field(
        None, description="which (default: hf, and those that the runtimes in serve_on read)"
    )
    gguf_type: Literal["F32", "F16", "BF16", "Q8_0"] | None = Field(
        None, description="of matrices in a GGUF file (default: as the teacher's are stored)"
    )
