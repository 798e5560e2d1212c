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
import tempfile
from pathlib import Path
from typing import Any

import transformers
from environment import environment

from puzzle.checkpoint import read_shape
from puzzle.config import GridFile, load, locate
from puzzle.modeling import PuzzleConfig
from puzzle.profiling.grid import GridPoint, grid_points
from puzzle.profiling.measure import measure_many
from puzzle.profiling.probes import ModelProbe, site_probe
from puzzle.profiling.stack import SiteStack, random_model
from puzzle.space import SearchSpace
from puzzle.types import ModelShape, Site, Spec
from puzzle.variants import block_part, shape_id

RESULTS = Path(__file__).parent / "results" / "profile_accuracy.json"
ATTENTION = ("keep", "gqa-*", "linear", "skip")
FFN = ("keep", "narrow-75%", "narrow-50%", "narrow-25%", "narrow-10%", "linear", "skip")
EXPERTS = ("experts-50%", "active-1")
WINDOW_TOKENS = 64
Architecture = tuple[tuple[Spec, Spec], ...]


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
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return read_shape(Path(folder))


def space_of(shape: ModelShape) -> SearchSpace:
    """The demo's kinds; of those that only some teachers can have, one each."""
    ffn = [*FFN, *(EXPERTS if shape.moe_layers else ())]
    return SearchSpace.parse({"attention": [*ATTENTION, f"window-{WINDOW_TOKENS}"], "ffn": ffn}, shape)


def architectures(space: SearchSpace, num_layers: int, seed: int) -> dict[str, Architecture]:
    """The teacher, and three students drawn at random: any variant, attention only cut, half of the sites kept."""
    rng = random.Random(seed)
    sites = [(Site(layer, "attention"), Site(layer, "ffn")) for layer in range(num_layers)]
    keep = tuple((space.on_offer[attention][0], space.on_offer[ffn][0]) for attention, ffn in sites)
    first, second, third = (
        tuple((rng.choice(space.on_offer[attention]), rng.choice(space.on_offer[ffn])) for attention, ffn in sites)
        for _ in range(3)
    )
    return {
        "teacher": keep,
        "student-any": first,
        "student-attention": tuple((pair[0], own[1]) for pair, own in zip(second, keep, strict=True)),
        "student-half": tuple(pair if layer % 2 else keep[layer] for layer, pair in enumerate(third)),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per grid point and model."""
    teacher = transformers.AutoConfig.from_pretrained(args.model) if args.model else bundled_teacher()
    shape, config = shape_of(teacher), PuzzleConfig.from_family(teacher)
    space = space_of(shape)
    specs = [spec for item in space.items() for spec in item.specs]
    stack = SiteStack.build(shape, config, specs, args.device, args.dtype)
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
