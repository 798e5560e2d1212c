"""How well the sum of measured parts predicts whole models.

Builds the bundled teacher's shape with random weights (or takes ``--model``'s config), and at every point of the demo
grid measures all shapes, the teacher and three heterogeneous students in the same rounds. Writes
``benchmarks/results/profile_accuracy.json``: predicted / measured per point and model, machine, versions, date.

    python benchmarks/bench_profile_accuracy.py [--model DIR] [--grid demo] [--device cuda] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

import transformers
from environment import environment

from puzzle.config import GridFile, load, locate
from puzzle.modeling import PuzzleConfig
from puzzle.profiling.grid import GridPoint, grid_points
from puzzle.profiling.measure import ModelProbe, SiteStack, measure_many, random_model, site_probe
from puzzle.types import AttentionSpec, FfnSpec, ModelShape
from puzzle.variants import SearchSpace, block_part, shape_id

RESULTS = Path(__file__).parent / "results" / "profile_accuracy.json"
ATTENTION = ("keep", "gqa-*", "linear", "skip")
FFN = ("keep", "narrow-75%", "narrow-50%", "narrow-25%", "narrow-10%", "linear", "skip")
Architecture = tuple[tuple[AttentionSpec, FfnSpec], ...]


def bundled_teacher() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def shape_of(config: transformers.PretrainedConfig) -> ModelShape:
    return ModelShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        tied_embeddings=config.tie_word_embeddings,
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
    )


def architectures(space: SearchSpace, num_layers: int, seed: int) -> dict[str, Architecture]:
    """The teacher, and three students drawn at random: any variant, attention only cut, half of the sites kept."""
    rng = random.Random(seed)
    keep = (space.attention[0], space.ffn[0])
    draw = [(rng.choice(space.attention), rng.choice(space.ffn)) for _ in range(3 * num_layers)]
    first, second, third = (draw[start : start + num_layers] for start in range(0, len(draw), num_layers))
    return {
        "teacher": (keep,) * num_layers,
        "student-any": tuple(first),
        "student-attention": tuple((attention, keep[1]) for attention, _ in second),
        "student-half": tuple(pair if layer % 2 else keep for layer, pair in enumerate(third)),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per grid point and model."""
    teacher = transformers.AutoConfig.from_pretrained(args.model) if args.model else bundled_teacher()
    shape, config = shape_of(teacher), PuzzleConfig.from_family(teacher)
    space = SearchSpace.parse(ATTENTION, FFN, shape)
    stack = SiteStack.build(shape, config, (*space.attention, *space.ffn), args.device, args.dtype)
    models = architectures(space, shape.num_layers, args.seed)
    built = {
        name: random_model(
            config,
            [{"attention": block_part(attention), "ffn": block_part(ffn)} for attention, ffn in layers],
            args.device,
            args.dtype,
        )
        for name, layers in models.items()
    }
    grid = load(GridFile, locate("grid", args.grid))
    rows: list[dict[str, Any]] = []
    for point in grid_points(grid, shape):
        probes = [site_probe(stack, point), *(ModelProbe(name, model, point) for name, model in built.items())]
        timings = measure_many(probes, args.repeats or grid.repeats, args.seed)
        for name, layers in models.items():
            ids = [shape_id(spec, shape) for pair in layers for spec in pair if spec.kind != "skip"]
            predicted = timings["rest"].ms + sum(max(0.0, timings[part].ms) for part in ids)
            whole = timings[name]
            rows.append(_row(point, name, predicted) | {"measured_ms": whole.ms, "ratio": predicted / whole.ms})
            rows[-1] |= {"measured_ms_p10": whole.ms_p10, "measured_ms_p90": whole.ms_p90}
            print("{phase:8}{batch_size:4}{context_tokens:7}  {model:18}{ratio:7.3f}".format(**rows[-1]), flush=True)
    return rows


def _row(point: GridPoint, name: str, predicted_ms: float) -> dict[str, Any]:
    return {
        "phase": point.phase,
        "batch_size": point.batch_size,
        "context_tokens": point.context_tokens,
        "model": name,
        "predicted_ms": predicted_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a checkpoint whose config gives the shape; default: the bundled teacher's shape"
    )
    parser.add_argument("--grid", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, help="rounds per point; default: the grid's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    print("phase  batch context  model              predicted / measured")
    rows = measure(args)
    errors = [abs(row["ratio"] - 1) for row in rows]
    summary = {"median_error": statistics.median(errors), "largest_error": max(errors)}
    print(f"median error {summary['median_error']:.1%}, largest {summary['largest_error']:.1%}")
    result = {
        "environment": environment(args.device)
        | {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None},
        "settings": {"model": args.model or "bundled shape", "dtype": args.dtype, "grid": args.grid, "seed": args.seed},
        "summary": summary,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
