"""Speeds that `vllm bench serve`, `latency` or `throughput` measured, to stand beside what the search predicted. Pure.

Reads the JSON that they write (serve: ``--save-result``, the others: ``--output-json``; as of vLLM 0.33) and holds it
against the workload that it is of, as far as it says what it measured: `latency` names neither lengths nor batch size,
`throughput` no batch size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import artifacts
from puzzle.search.constraints import workloads
from puzzle.search.goal import nearest
from puzzle.types import ConfigError, PuzzleError, Workload

if TYPE_CHECKING:
    from puzzle.run import Run

SERVE = {  # our names of what it reports
    "mean_ttft_ms": "ttft_ms",
    "mean_tpot_ms": "tpot_ms",
    "mean_e2el_ms": "e2e_ms",
    "output_throughput": "output_tok_per_s",
    "total_token_throughput": "total_tok_per_s",
    "request_throughput": "req_per_s",
}
THROUGHPUT = {"requests_per_second": "req_per_s", "tokens_per_second": "total_tok_per_s"}
TOLERANCE = 0.05  # of tokens per request: prompts are made of text, and some stop early
MODELS = ("teacher", "student")


def note_bench(run: Run, given: str) -> None:
    """Publishes the figures of ``WORKLOAD.MODEL=FILE`` for the run's student as it is now."""
    name, equals, file = given.partition("=")
    workload_name, _, model = name.rpartition(".")
    known = {workload.name: workload for workload in workloads(run.constraint_file, run.shape)}
    if not equals or model not in MODELS:
        raise ConfigError(f"--vllm-bench {given}: write WORKLOAD.student=FILE or WORKLOAD.teacher=FILE")
    if workload_name not in known:
        raise ConfigError(f"--vllm-bench {given}: no workload of that name{nearest(workload_name, known)}")
    found = bench_figures(Path(file), known[workload_name], run.batch_sizes[workload_name])
    artifacts.publish_json(run.served / f"{name}.json", {"file": artifacts.file_fingerprint(Path(file))}, found)


def bench_figures(path: Path, workload: Workload, batch_size: int) -> dict[str, float]:
    """By our metrics' names. ConfigError where the file is none of theirs, or of another workload."""
    text = path.read_bytes()
    try:
        found = _figures(path, json.loads(text), workload, batch_size)
        if odd := [name for name, value in found.items() if not 0 < value < math.inf]:
            raise ValueError(f"{odd[0]} is {found[odd[0]]}")
        return found
    except PuzzleError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{path}: not what `vllm bench` writes (serve --save-result; latency, throughput --output-json): {error!r}"
        ) from None


def _figures(path: Path, found: Any, workload: Workload, batch_size: int) -> dict[str, float]:
    if "mean_ttft_ms" in found:
        _check_served(path, found, workload, batch_size)
        return {ours: float(found[theirs]) for theirs, ours in SERVE.items() if theirs in found}
    if "avg_latency" in found:
        return {"e2e_ms": float(found["avg_latency"]) * 1e3}
    tokens = found["total_num_tokens"] / found["num_requests"]
    _check_tokens(path, "tokens of prompt and answer", tokens, workload.context_tokens)
    return {ours: float(found[theirs]) for theirs, ours in THROUGHPUT.items()}


def _check_served(path: Path, found: Mapping[str, Any], workload: Workload, batch_size: int) -> None:
    completed = found["completed"]
    if failed := found["num_prompts"] - completed:
        raise ConfigError(f"{path}: {failed} of {found['num_prompts']} requests failed")
    if found["request_rate"] != "inf" or found["max_concurrency"] != batch_size:
        raise ConfigError(
            f"{path}: measured at a request rate of {found['request_rate']} and a concurrency of "
            f"{found['max_concurrency']}; {workload.name} has {batch_size} at a time: "
            f"--request-rate inf --max-concurrency {batch_size}"
        )
    _check_tokens(path, "tokens of prompt", found["total_input_tokens"] / completed, workload.isl)
    _check_tokens(path, "tokens of answer", found["total_output_tokens"] / completed, workload.osl)


def _check_tokens(path: Path, what: str, found: float, expected: int) -> None:
    if not abs(found - expected) <= TOLERANCE * expected:  # nor may it be a NaN
        raise ConfigError(f"{path}: {found:,.0f} {what} per request, where the workload has {expected:,}")


def served_figures(run: Run) -> dict[str, Mapping[str, float]]:
    """By ``WORKLOAD.MODEL``, of the run's student as it is now."""
    return {path.stem: artifacts.read_unit(path).read(dict[str, float]) for path in sorted(run.served.glob("*.json"))}
