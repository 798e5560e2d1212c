"""The library, its scores and its costs: sections of the run configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from puzzle.config.fields import Fraction, Model, Natural, NonNegative, Positive, PositiveFloat


class InitConfig(Model):
    """``start: best`` takes, variant by variant, the one with the lowest loss on windows of train that are held out."""

    start: Literal["best", "paper"] = Field(
        "best", description="the best of all starting points on held-out windows, or the paper's"
    )
    sequences: Positive = Field(128, description="how many of train they are made from")


class DistillConfig(Model):
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


class ScoreConfig(Model):
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


class AdditivityConfig(Model):
    """Near-optimal and random architectures, mild and hard, in equal numbers."""

    architectures: Positive = Field(120, description="how many are evaluated truly")


class RefineConfig(Model):
    """The search past sums of scores, by true evaluations on ``evaluate.sequences`` of select."""

    evaluations: Natural = Field(
        0, description="whole architectures that are evaluated truly; 0: the search's answer is taken as it is"
    )
    seed: Natural = Field(0, description="of the study of a score other than KL")


class VllmConfig(Model):
    """vLLM's own environment, and how it is started."""

    python: str = Field(description="the interpreter of vLLM's own environment")
    tp: Positive = Field(1, description="tensor parallelism")
    num_layers: Positive | None = Field(None, description="of the models that are measured; default the teacher's")
    max_batched_tokens: Positive = Field(8192, description="of all prompts in one forward")
    kv_cache_gib: PositiveFloat | None = Field(None, description="default: as much as vLLM takes")


class ProfileConfig(Model):
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
