"""From the constraints of a puzzletron config (NVIDIA Model Optimizer 0.47) to a constraint file of ours.

Reads the YAML files that puzzletron is configured by: ``mip.human_constraints`` or ``mip.mip_constraints``,
``mip.subblock_stats_args``, ``mip.sweep``, ``mip.objective``, and the lengths in ``calc_subblock_stats``. Computes the
text of our file. What has no counterpart is named, never dropped: ``left`` says each key and why. Several files are
merged as their ``defaults:`` would, later ones over earlier ones; interpolations (``${…}``) are not resolved.

There ``target_memory`` and ``stats.memory_mib`` are MiB, targets in seconds and ``stats.runtime_ms`` the time of whole
requests; a single number bounds from above (``target_throughput``: from below), a pair is [min, max].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puzzle import yamlfiles
from puzzle.config import ConstraintFile
from puzzle.search.constraints import bounds
from puzzle.search.fan_out import picks
from puzzle.search.metrics import METRICS
from puzzle.types import ConfigError

WORKLOAD = "serving"
MIB_PER_GIB = 1024


@dataclass(frozen=True)
class _Key:
    """Our metric for one of their keys: theirs times ``factor``; ``lower``: a single number is a minimum."""

    metric: str
    factor: float = 1.0
    lower: bool = False


HUMAN = {
    "target_memory": _Key("memory_gib", 1 / MIB_PER_GIB),
    "target_throughput": _Key("output_tok_per_s", lower=True),
    "target_latency_seconds": _Key("e2e_ms", 1000),
    "target_time_to_first_token": _Key("ttft_ms", 1000),
    "num_params": _Key("params"),
    "stats.has_attention": _Key("layers_with_attention"),
}
MIP = {
    "stats.memory_mib": _Key("memory_gib", 1 / MIB_PER_GIB),
    "stats.kv_cache_memory_mib": _Key("kv_cache_gib", 1 / MIB_PER_GIB),
    "stats.runtime_ms": _Key("e2e_ms"),
    "stats.prefill_runtime_ms": _Key("ttft_ms"),
    "stats.num_params": _Key("params"),
    "stats.active_params": _Key("active_params"),
    "stats.has_attention": _Key("layers_with_attention"),
    "stats.has_ffn": _Key("layers_with_ffn"),
    "stats.num_kv_heads": _Key("kv_heads_total"),
}
OBJECTIVES = {
    "metrics.kl_div_loss": "kl_nats",
    "metrics.lm_loss": "ce_delta_nats",
    "metrics.cosine_embedding_loss_hidden_states": "hidden_distance",
}
DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float8_e4m3fn": "fp8"}
PROFILE_KEYS = ("human_constraints", "mip_constraints", "subblock_stats_args")  # at the top of a puzzle_profile file
NO_CONSTRAINT = "says nothing about what a student must fit"


@dataclass(frozen=True)
class Imported:
    """``text`` of a constraint file, and ``left``: what of theirs it does not say."""

    text: str
    left: tuple[str, ...]


@dataclass
class _Reading:
    """What is being gathered."""

    source: str
    left: list[str] = field(default_factory=list)

    def leave(self, key: str, value: Any, why: str) -> None:
        if value is not None:
            self.left.append(" ".join(f"{key}: {json.dumps(value, default=str)} ({why})".split()))


def convert(
    files: Sequence[Path], isl: int | None = None, osl: int | None = None, device: str | None = None
) -> Imported:
    """The constraint file that ``files`` amount to; ``isl`` and ``osl`` where they do not say the lengths.

    ConfigError for files without constraints, and for values that are no numbers.
    """
    document: dict[str, Any] = {}
    for path in files:
        document = _merged(document, yamlfiles.plain(yamlfiles.read_yaml(path)))
    reading = _Reading(" ".join(", ".join(path.name for path in files).split()))
    mip = document.get("mip") if isinstance(document.get("mip"), dict) else None
    if mip is None:
        mip = {key: document.pop(key) for key in list(document) if key in (*PROFILE_KEYS, "objective")}
    limits = _limits(mip, reading)
    workload = _workload(mip, document, reading, (isl, osl), device)
    objective = _objective(mip, reading)
    for key, value in mip.items():
        if key not in (*PROFILE_KEYS, "objective", "sweep"):
            reading.leave(f"mip.{key}", None if value is False else value, NO_CONSTRAINT)
    sections = [key for key in document if key not in ("mip", "calc_subblock_stats")]
    reading.leave("other sections", sections or None, NO_CONSTRAINT)
    text = _written(limits, workload, objective, reading)
    file = yamlfiles.parse(ConstraintFile, text, Path(reading.source))
    for one in picks(file):
        bounds(one.file)
    return Imported(text, tuple(reading.left))


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(under)
    for key, value in over.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _limits(mip: Mapping[str, Any], reading: _Reading) -> dict[str, Any]:
    """Our bounds by our metric. As there, ``mip_constraints`` go before ``human_constraints``."""
    direct, human = mip.get("mip_constraints"), mip.get("human_constraints")
    if direct is not None:
        reading.leave("mip.human_constraints", human, "mip_constraints go before them there, too")
    name, table = ("mip_constraints", MIP) if direct is not None else ("human_constraints", HUMAN)
    given = direct if direct is not None else human
    sweep = mip.get("sweep") or {}
    if not given and not (isinstance(sweep, dict) and sweep.get("enabled")):
        later = "; mip.runs is of a later version, and not read" if "runs" in mip else ""
        raise ConfigError(f"{reading.source}: no mip.human_constraints and no mip.mip_constraints{later}")
    alternatives = given if isinstance(given, list) else [given or {}]
    limits = _with_alternatives(alternatives, f"mip.{name}", table, reading)
    if isinstance(sweep, dict) and sweep.get("enabled"):
        rates = sweep.get("memory_compression_rates") or []
        values = [f"{_number(rate, 'mip.sweep.memory_compression_rates', reading) * 100:.6g}%" for rate in rates]
        if not values:
            raise ConfigError(f"{reading.source}: mip.sweep is enabled without memory_compression_rates")
        limits["memory_gib"] = {"values": values}
        reading.leave("mip.sweep.output_csv", sweep.get("output_csv"), "puzzle search prints a table")
    elif sweep:
        reading.leave("mip.sweep", sweep, "not enabled")
    return limits


def _with_alternatives(
    alternatives: Sequence[Any], name: str, table: Mapping[str, _Key], reading: _Reading
) -> dict[str, Any]:
    """A list of constraints is one search for each: ours if they differ in one number, else the first of them."""
    if not all(isinstance(one, dict) for one in alternatives):
        raise ConfigError(f"{reading.source}: {name} is not made of `key: value` lines")
    first, *others = [
        _translated(one, name, table, reading, tell=not number) for number, one in enumerate(alternatives)
    ]
    differing = [key for key in first if any(other.get(key) != first[key] for other in others)]
    same_keys = all(other.keys() == first.keys() for other in others)
    if others and same_keys and len(differing) == 1:
        (key,) = differing
        values = [_only(one[key], METRICS[key].scalar) for one in (first, *others)]
        if None not in values and len(set(values)) == len(values):
            return {**first, key: {"values": values}}
    for number, other in enumerate(alternatives[1:], start=1):
        reading.leave(f"{name}[{number}]", other, "a search of its own: import it alone")
    return first


def _only(bound: Mapping[str, float], side: str) -> float | None:
    """The number of a bound that a bare scalar would say, too."""
    return bound[side] if bound.keys() == {side} else None


def _translated(
    constraints: Mapping[str, Any], name: str, table: Mapping[str, _Key], reading: _Reading, tell: bool
) -> dict[str, dict[str, float]]:
    limits: dict[str, dict[str, float]] = {}
    for key, value in _flat(constraints).items():
        if key not in table:
            if tell:
                reading.leave(f"{name}.{key}", value, "no metric of ours")
        elif value is not None:
            ours = table[key]
            sides = zip(("min", "max"), value, strict=False) if isinstance(value, list) else None
            pairs = list(sides) if sides else [("min" if ours.lower else "max", value)]
            numbers = {
                side: _number(one, f"{name}.{key}", reading) * ours.factor for side, one in pairs if one is not None
            }
            if numbers:
                limits[ours.metric] = numbers
    return limits


def _flat(constraints: Mapping[str, Any]) -> dict[str, Any]:
    """``{stats: {memory_mib: 5}}`` is ``{stats.memory_mib: 5}``, as on their command line."""
    nested = constraints.get("stats")
    if not isinstance(nested, dict):
        return dict(constraints)
    rest = {key: value for key, value in constraints.items() if key != "stats"}
    return {**rest, **{f"stats.{key}": value for key, value in nested.items()}}


def _number(value: Any, key: str, reading: _Reading) -> float:
    """A number, or billions written as ``7.5B``."""
    text = str(value)
    try:
        number = math.nan if isinstance(value, bool) else float(text.removesuffix("B"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        hint = "; write the number that it stands for" if "${" in text or text == "???" else ""
        raise ConfigError(f"{reading.source}: {key}: expected a number, found {value!r}{hint}")
    return number * (1e9 if text.endswith("B") else 1)


def _workload(
    mip: Mapping[str, Any],
    document: Mapping[str, Any],
    reading: _Reading,
    lengths: tuple[int | None, int | None],
    device: str | None,
) -> dict[str, Any]:
    given = mip.get("subblock_stats_args")
    scenarios = given if isinstance(given, list) else [given or {}]
    stats = document.get("calc_subblock_stats")
    stats = stats if isinstance(stats, dict) else {}
    if not scenarios or not all(isinstance(one, dict) for one in scenarios):
        raise ConfigError(f"{reading.source}: mip.subblock_stats_args is not made of `key: value` lines")
    first = scenarios[0]
    for number, other in enumerate(scenarios[1:], start=1):
        reading.leave(f"mip.subblock_stats_args[{number}]", other, "a search of its own: import it alone")
    workload: dict[str, Any] = {}
    for ours, theirs, asked in (("isl", "prefill_seq_len", lengths[0]), ("osl", "generation_seq_len", lengths[1])):
        value = asked if asked is not None else first.get(theirs, stats.get(theirs))
        if value is None:
            raise ConfigError(
                f"{reading.source}: {theirs} is not said; give the file that it is in, too, or --{ours} {ours.upper()}"
            )
        workload[ours] = int(_number(value, theirs, reading))
    if (batch_size := first.get("batch_size")) is None:
        raise ConfigError(f"{reading.source}: mip.subblock_stats_args says no batch_size; give the file that does, too")
    workload["batch_size"] = int(_number(batch_size, "mip.subblock_stats_args.batch_size", reading))
    for ours, theirs in (("weights", "weights_dtype"), ("kv", "kv_cache_dtype")):
        if str(dtype := first.get(theirs)) in DTYPES:
            workload[ours] = DTYPES[str(dtype)]
        else:
            reading.leave(f"mip.subblock_stats_args.{theirs}", dtype, "no dtype of ours; bf16 taken")
    if (dtype := first.get("activations_dtype")) != first.get("weights_dtype"):
        reading.leave("mip.subblock_stats_args.activations_dtype", dtype, "activations follow the weights here")
    known = (
        "batch_size",
        "prefill_seq_len",
        "generation_seq_len",
        "weights_dtype",
        "kv_cache_dtype",
        "activations_dtype",
    )
    for key, value in first.items():
        if key not in known:
            reading.leave(f"mip.subblock_stats_args.{key}", value, "no counterpart")
    for key, value in stats.items():
        if key not in ("prefill_seq_len", "generation_seq_len"):
            reading.leave(
                f"calc_subblock_stats.{key}", value, "how costs are measured: see profile in the run's config"
            )
    if device is not None:
        workload["device"] = device
    return workload


def _objective(mip: Mapping[str, Any], reading: _Reading) -> str:
    given = mip.get("objective")
    if str(given) in OBJECTIVES:
        return OBJECTIVES[str(given)]
    reading.leave("mip.objective", given, "no score of ours; kl_nats taken")
    return "kl_nats"


def _written(limits: Mapping[str, Any], workload: Mapping[str, Any], objective: str, reading: _Reading) -> str:
    device = "" if "device" in workload else "  # where times are to hold: add device: …"
    lines = [
        f"# From {reading.source} (puzzletron). memory_gib counts the workspace, too, and is that of one of tp GPUs.",
        "workloads:",
        f"  {WORKLOAD}: {_flow(workload)}{device}",
        "",
        "constraints:" if limits else "constraints: {}",
        *(f"  {metric}: {_flow(bound)}" for metric, bound in limits.items()),
        "",
        f"objective: {objective}",
    ]
    if reading.left:
        lines += ["", "# Not taken over:", *(f"#   {one}" for one in reading.left)]
    return "\n".join(lines) + "\n"


def _flow(values: Mapping[str, Any]) -> str:
    """A mapping on one line of YAML."""

    def one(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(one(item) for item in value)}]"
        return (
            f"{value:.12g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, str) else str(value)
        )

    return "{" + ", ".join(f"{key}: {one(value)}" for key, value in values.items()) + "}"
