"""The records that flow between the stages: frozen, with units in the field names. Pure data, no torch.

Reads nothing and writes nothing but JSON-ready dictionaries (:func:`to_json`, :func:`from_json`). The checks that a
record must satisfy wherever it comes from live here, so that a table read from disk is as trustworthy as one just made.
Units: ``_ms`` milliseconds, ``_bytes`` bytes, ``_tokens`` tokens, ``_nats`` nats per token; ``params`` is a count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

Part = Literal["attention", "ffn"]
Phase = Literal["prefill", "decode"]
Target = Literal[
    "transformers", "vllm-plugin", "vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx-lm"
]  # what a student is written for
Format = Literal["hf", "nemotron-nas", "gguf", "mlx"]  # of an export
TEACHER_CONTEXT = "teacher"
GIB = 2**30


class PuzzleError(ValueError):
    """What went wrong on the user's side, in one line that says what to do; ``exit_code`` is the command's."""

    exit_code = 1


class ConfigError(PuzzleError):
    exit_code = 2


class InfeasibleError(PuzzleError):
    exit_code = 3


class OutOfTimeError(PuzzleError):
    """The time given ended before any architecture was found; none has a total below ``bound``."""

    exit_code = 3

    def __init__(self, message: str, bound: float) -> None:
        super().__init__(message)
        self.bound = bound

    def __reduce__(self) -> tuple[type[OutOfTimeError], tuple[str, float]]:
        return OutOfTimeError, (str(self), self.bound)


class MissingMeasurementError(PuzzleError):
    exit_code = 4


class CorruptFileError(PuzzleError):
    exit_code = 5


class StaleUnitError(PuzzleError):
    exit_code = 6


class Strict:
    """Makes pydantic refuse unknown keys when a record is read back."""

    __pydantic_config__ = ConfigDict(extra="forbid")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, order=True)
class Site(Strict):
    """One replaceable part of one layer."""

    layer: int
    part: Part

    def __post_init__(self) -> None:
        _require(self.layer >= 0, f"layer must not be negative, got {self.layer}")

    def __str__(self) -> str:
        return f"L{self.layer:03d}.{self.part}"


@dataclass(frozen=True)
class AttentionSpec(Strict):
    """``precision`` None: the teacher's. Kinds: keep, gqa (``num_kv_heads``), window (``window_tokens``), linear, skip.

    ``window_tokens`` of keep and gqa is the span that the teacher's own layer is limited to, None where it sees all. A
    window may keep the first ``sink_tokens`` of the sequence in sight.
    """

    kind: Literal["keep", "gqa", "window", "linear", "skip"]
    num_kv_heads: int | None = None
    window_tokens: int | None = None
    precision: str | None = None
    sink_tokens: int | None = None

    def __post_init__(self) -> None:
        _require((self.kind == "gqa") == (self.num_kv_heads is not None), "gqa, and only gqa, names num_kv_heads")
        _require(self.kind != "window" or self.window_tokens is not None, "window names window_tokens")
        attends = self.kind in ("keep", "gqa", "window")
        _require(attends or self.window_tokens is None, "only real attention has a window")
        _require(self.kind == "window" or self.sink_tokens is None, "only window names sink_tokens")
        sizes = (self.num_kv_heads, self.window_tokens, self.sink_tokens)
        _require(all(size is None or size > 0 for size in sizes), "sizes must be positive")


@dataclass(frozen=True)
class FfnSpec(Strict):
    """Kinds: keep, narrow (``intermediate_size``), experts (``num_experts``), active (``num_active_experts``), linear,
    skip. At a layer with experts, keep, experts and active name both numbers once they are resolved (variants.resolve).

    ``num_fused``: of how many FFNs of one width the channels of a narrow one are (variants.fused_item).
    """

    kind: Literal["keep", "narrow", "experts", "active", "linear", "skip"]
    intermediate_size: int | None = None
    num_experts: int | None = None
    num_active_experts: int | None = None
    precision: str | None = None
    num_fused: int | None = None

    def __post_init__(self) -> None:
        _require(
            (self.kind == "narrow") == (self.intermediate_size is not None), "narrow, and only narrow, names a width"
        )
        _require(self.kind != "experts" or self.num_experts is not None, "experts names num_experts")
        _require(self.kind != "active" or self.num_active_experts is not None, "active names num_active_experts")
        counted = self.num_experts is not None or self.num_active_experts is not None
        _require(self.kind in ("keep", "experts", "active") or not counted, f"{self.kind} has no experts")
        fused = self.num_fused is None or (self.num_fused > 1 and (self.intermediate_size or 1) % self.num_fused == 0)
        _require(fused, "several FFNs of one width are fused, and they are narrow")
        sizes = (self.intermediate_size, self.num_experts, self.num_active_experts)
        _require(all(size is None or size > 0 for size in sizes), "sizes must be positive")


Spec = AttentionSpec | FfnSpec


def part_of(spec: Spec) -> Part:
    return "attention" if isinstance(spec, AttentionSpec) else "ffn"


Architecture = tuple[tuple[AttentionSpec, FfnSpec], ...]  # both parts of every layer, resolved


@dataclass(frozen=True)
class Item(Strict):
    """What the search chooses: ``specs[i]`` at ``sites[i]``; usually one site, but a pair or a run of layers too."""

    id: str
    sites: tuple[Site, ...]
    specs: tuple[Spec, ...]

    def __post_init__(self) -> None:
        _require(len(self.sites) > 0 and len(self.sites) == len(self.specs), f"{self.id}: one spec per site")
        _require(len(set(self.sites)) == len(self.sites), f"{self.id}: a site occurs twice")
        for site, spec in self.at.items():
            _require(isinstance(spec, AttentionSpec) == (site.part == "attention"), f"{self.id}: wrong spec for {site}")

    @property
    def at(self) -> dict[Site, Spec]:
        """The spec at each site."""
        return dict(zip(self.sites, self.specs, strict=True))

    @property
    def layers(self) -> tuple[int, ...]:
        """Each once, in ascending order."""
        return tuple(sorted({site.layer for site in self.sites}))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; of a single value the error is unknown: infinite."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


@dataclass(frozen=True)
class Score(Strict):
    """How much worse the model gets, one value per sequence (nats per token for KL and CE).

    ``method``: measured on the whole model, or estimated from the teacher's gradients (scoring/one_pass.py).
    """

    item_id: str
    base_id: str
    context_id: str
    metric: str
    split: str
    per_sequence: tuple[float, ...]
    context_tokens: int
    method: Literal["exact", "one-pass"] = "exact"

    def __post_init__(self) -> None:
        _require(len(self.per_sequence) > 0, f"{self.item_id}: a score without values")
        _require(all(map(math.isfinite, self.per_sequence)), f"{self.item_id}: the {self.metric} score is not finite")

    @property
    def mean(self) -> float:
        return math.fsum(self.per_sequence) / len(self.per_sequence)

    @property
    def standard_error(self) -> float:
        """Of the mean, from the spread over sequences; infinite for a single sequence."""
        return mean_and_error(self.per_sequence)[1]


@dataclass(frozen=True)
class Cost(Strict):
    """Milliseconds that one shape takes for one forward of the whole batch, at one point of the grid.

    ``context_tokens``: prefill, the prompt length; decode, the tokens already in the KV cache when one more is made.
    """

    shape_id: str
    phase: Phase
    batch_size: int
    context_tokens: int
    weights: str
    kv: str
    device: str
    tensor_parallel: int
    engine: str
    ms: float
    ms_p10: float
    ms_p90: float
    source: Literal["measured", "estimate", "imported"]

    def __post_init__(self) -> None:
        _require(self.batch_size > 0 and self.context_tokens > 0 and self.tensor_parallel > 0, "sizes must be positive")
        finite = all(map(math.isfinite, (self.ms, self.ms_p10, self.ms_p90)))
        _require(finite and self.ms > 0, f"{self.shape_id}: {self.phase} time is not a finite, positive number")

    @property
    def setting(self) -> CostSetting:
        return CostSetting(self.device, self.weights, self.kv, self.tensor_parallel, self.engine)


@dataclass(frozen=True, order=True)
class CostSetting(Strict):
    """What a time holds for: it says nothing about another device, dtype, parallelism or engine."""

    device: str
    weights: str
    kv: str
    tensor_parallel: int
    engine: str

    def __str__(self) -> str:
        return (
            f"device {self.device} with weights {self.weights}, kv {self.kv}, tp {self.tensor_parallel}, "
            f"runtime {self.engine}"
        )


@dataclass(frozen=True)
class Gap(Strict):
    """A point of the grid that could not be measured, or one shape at it (``shape_id``), and why."""

    phase: Phase
    batch_size: int
    context_tokens: int
    reason: str
    shape_id: str | None = None


@dataclass(frozen=True)
class Correction(Strict):
    """What measured whole models say of the sums of their parts in one phase::

        whole = rest + overhead_ms + attention_factor * sum(attention) + ffn_factor * sum(ffn)

    ``relative_error``: root mean square of what is left, each model predicted from the others.
    """

    setting: CostSetting
    phase: Phase
    overhead_ms: float
    attention_factor: float
    ffn_factor: float
    relative_error: float

    def __post_init__(self) -> None:
        factors = (self.attention_factor, self.ffn_factor)
        _require(all(math.isfinite(one) and one > 0 for one in factors), "factors must be positive")
        _require(math.isfinite(self.overhead_ms), "the overhead must be finite")
        _require(0 <= self.relative_error < math.inf, "the error must be finite and not negative")


@dataclass(frozen=True)
class Costs:
    """All that is known of times: ``rows``, where they are missing and why, and how far sums of them are off.

    ``safety``: how many standard errors of a predicted time the search keeps clear of a limit. ``original``: shape and
    times of the teacher that percentages are of, where it is of another width than what these are costs of.
    """

    rows: tuple[Cost, ...] = field(default=(), repr=False)
    gaps: tuple[Gap, ...] = ()
    corrections: tuple[Correction, ...] = ()
    safety: float = 0.0
    original: tuple[ModelShape, Costs] | None = None


@dataclass(frozen=True)
class Interaction(Strict):
    """What two items cost together beyond the sum of their scores."""

    item_a: str
    item_b: str
    value_nats: float

    def __post_init__(self) -> None:
        _require(
            self.item_a != self.item_b and math.isfinite(self.value_nats), "an interaction joins two items, finitely"
        )


@dataclass(frozen=True)
class Conflict(Strict):
    """Items that must not all be chosen together."""

    item_ids: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Capability(Strict):
    """What one target runtime makes of one variant (capabilities.py)."""

    target: Target
    status: Literal["supported", "lowered", "refused"]
    reason: str
    lowered_to: str | None = None


@dataclass(frozen=True)
class Solution(Strict):
    """The answer of the search. ``totals`` are predicted metrics by name; ``inputs`` what it rests on.

    ``objective_nats``: the sum of the scores that the constraint file calls ``objective_name``, in that score's unit
    (nats for all whose names end in it); no answer has one below ``bound_nats``. Where a cost was ``minimised`` in its
    place, the sum was bounded, and it is the cost that no answer brings below ``cost_bound`` (a rate: above it).
    ``objective_se``: standard error of the sum of the scores, over sequences; None where that is not known.
    ``estimated``: the metrics among them that rest on times nobody measured. ``gap``: how far what was minimised may be
    from the best there is, relative to itself; ``timed_out``: because the solver's time was up. ``found_by``: the
    search, or refine, which chose by true quality.
    """

    items: tuple[str, ...]
    objective_nats: float
    bound_nats: float | None
    status: Literal["optimal", "feasible"]
    totals: dict[str, float] = field(hash=False)
    inputs: dict[str, str] = field(hash=False)
    objective_se: float | None = None
    estimated: tuple[str, ...] = ()
    objective_name: str = ""
    minimised: str | None = None
    cost_bound: float | None = None
    gap: float | None = None
    timed_out: bool = False
    found_by: Literal["search", "refine"] = "search"


@dataclass(frozen=True)
class ModelShape(Strict):
    """The sizes of a decoder-only model that its costs depend on.

    ``windows``: per layer, the tokens that its attention is limited to, None where it sees all; empty: no layer has
    one. ``moe_layers`` are those whose FFN is ``num_experts`` experts of ``moe_intermediate_size`` channels, of which
    each token uses ``num_active_experts``. ``post_norms``: a norm after each block, too. ``qk_norm``: norms on queries
    and keys, of ``head_dim``.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    windows: tuple[int | None, ...] = ()
    moe_layers: tuple[int, ...] = ()
    num_experts: int = 0
    num_active_experts: int = 0
    moe_intermediate_size: int = 0

    def __post_init__(self) -> None:
        _require(len(self.windows) in (0, self.num_layers), "windows: one per layer")
        _require(not self.moe_layers or 0 < self.num_active_experts <= self.num_experts, "experts: at most all active")

    def window(self, layer: int) -> int | None:
        """The tokens that the layer's attention is limited to."""
        return self.windows[layer] if self.windows else None

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites in the order in which the residual stream meets them."""
        return tuple(Site(layer, part) for layer in range(self.num_layers) for part in ("attention", "ffn"))


@dataclass(frozen=True)
class Workload(Strict):
    """What is served: ``isl`` prompt and ``osl`` generated tokens per request, ``batch_sizes`` to choose from."""

    name: str
    isl: int
    osl: int
    batch_sizes: tuple[int, ...] = (1,)
    weights: str = "bf16"
    kv: str = "bf16"
    device: str = "cpu"
    tp: int = 1
    runtime: str = "transformers"

    def __post_init__(self) -> None:
        sizes = (self.isl, self.osl, self.tp, *self.batch_sizes)
        _require(bool(self.batch_sizes) and min(sizes) > 0, f"workload {self.name}: sizes must be positive")

    @property
    def context_tokens(self) -> int:
        """Tokens of one sequence when its last token has been made."""
        return self.isl + self.osl


Record = TypeVar("Record")


def to_json(record: Any) -> dict[str, Any]:
    """The record as plain dictionaries and lists."""
    return asdict(record)


@functools.cache  # building one costs a hundred times what using it does
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def from_json(kind: type[Record], data: Any, source: object) -> Record:
    """The record in ``data``; unknown, missing, wrong fields are a :class:`CorruptFileError` that names ``source``."""
    try:
        return _adapter(kind).validate_python(data)  # type: ignore[no-any-return, arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"] if part != kind.__name__)
        message = first["msg"].removeprefix("Value error, ")
        found = f" (found {first['input']!r})" if isinstance(first["input"], str | float) else ""
        raise CorruptFileError(f"{source}: not a valid {kind.__name__}: {where}{message}{found}") from None
