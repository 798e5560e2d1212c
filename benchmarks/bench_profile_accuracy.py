"""How well predicted times come true on whole models that nothing was fitted to.

Builds a teacher with random weights (50M parameters by default; or ``--model``'s config), and at every point measures
in the same rounds all shapes in place, the teacher, ``--held-out`` random architectures, those that `puzzle fit-costs`
corrects by, and the incumbent's way: per shape, ten equal blocks in a row, less a model without blocks, over ten.
Writes ``benchmarks/results/profile_accuracy.json``: per point and model the time measured and predicted by each way.
Errors: of the time; and of the *saving* against the teacher, over the saving that was measured.

    python benchmarks/bench_profile_accuracy.py [--model DIR] [--device cuda] [--dtype bf16] [--grid serving]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from environment import environment

from puzzle.checkpoint import read_shape
from puzzle.config import GridFile
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.profiling.correction import WholeModel, WholePoint, fit_phase, whole_models
from puzzle.profiling.grid import GridPoint, grid_points
from puzzle.profiling.measure import measure_many
from puzzle.profiling.probes import ModelProbe, Timing, site_probe
from puzzle.profiling.stack import SiteStack, random_model
from puzzle.space import SearchSpace
from puzzle.types import CostSetting, ModelShape, Spec
from puzzle.variants import block_part, shape_id
from puzzle.yamlfiles import load, locate

RESULTS = Path(__file__).parent / "results" / "profile_accuracy.json"
SPACE = {
    "attention": ["keep", "gqa-*", "linear", "skip"],
    "ffn": ["keep", "narrow-75%", "narrow-50%", "narrow-25%", "narrow-10%", "linear", "skip"],
}
POINTS = (  # unless --grid names others
    GridPoint("prefill", 1, 128),
    GridPoint("prefill", 4, 128),
    GridPoint("decode", 1, 128),
    GridPoint("decode", 8, 256),
)
FITTED = 6  # models drawn for the correction, beside the teacher
IN_A_ROW = 10  # equal blocks, the incumbent's way
WAYS = ("sum", "corrected", "ten in a row")
BASE = "base"
SETTING = CostSetting("any", "any", "any", 1, "any")


def teacher_of_50m() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def shape_of(config: transformers.PretrainedConfig) -> ModelShape:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return read_shape(Path(folder))


def blocks_of(specs: Sequence[Spec]) -> list[dict[str, Any]]:
    pairs = zip(specs[::2], specs[1::2], strict=True)
    return [{"attention": block_part(attention), "ffn": block_part(ffn)} for attention, ffn in pairs]


class Bench:
    """All that is measured: the stack, whole models by name with their specs, and rows of equal blocks."""

    def __init__(self, args: argparse.Namespace) -> None:
        teacher = transformers.AutoConfig.from_pretrained(args.model) if args.model else teacher_of_50m()
        self.args, self.shape, self.config = args, shape_of(teacher), PuzzleConfig.from_family(teacher)
        space = SearchSpace.parse(SPACE, self.shape, 64)
        drawn = whole_models(self.shape, space.items(), FITTED + args.held_out)
        self.specs = drawn
        self.fitted = list(drawn)[: FITTED + 1]  # the teacher first
        self.judged = ["teacher", *list(drawn)[FITTED + 1 :]]
        on_offer = [spec for item in space.items() for spec in item.specs]
        self.stack = SiteStack.build(self.shape, self.config, on_offer, args.device, args.dtype)
        self.models = {name: self.build(blocks_of(specs)) for name, specs in drawn.items()}
        by_shape = {shape_id(spec, self.shape): spec for spec in on_offer if spec.kind != "skip"}
        skip = {"attention": {"kind": "skip"}, "ffn": {"kind": "skip"}}
        self.rows_of_ten = {
            name: self.build([skip | {name.split(".")[0]: block_part(spec)}] * IN_A_ROW)
            for name, spec in by_shape.items()
        } | {BASE: self.build([skip])}

    def build(self, blocks: list[dict[str, Any]]) -> PuzzleForCausalLM:
        """Of the kind of the first layer: the teachers here have layers of one kind."""
        return random_model(self.config, blocks, self.args.device, self.args.dtype, layers=[0] * len(blocks))

    def ids(self, name: str) -> list[str]:
        return [shape_id(spec, self.shape) for spec in self.specs[name] if spec.kind != "skip"]

    def timings(self, point: GridPoint, repeats: int) -> dict[str, Timing]:
        probes = [
            site_probe(self.stack, point),
            *(ModelProbe(name, model, point) for name, model in self.models.items()),
            *(ModelProbe(f"ten {name}", model, point) for name, model in self.rows_of_ten.items()),
        ]
        return measure_many(probes, repeats, self.args.seed)


def in_parts(bench: Bench, point: GridPoint, name: str, timings: Mapping[str, Timing]) -> WholePoint:
    ms = {
        part: sum(timings[one].ms for one in bench.ids(name) if one.startswith(part)) for part in ("attention", "ffn")
    }
    rest, whole = timings["rest"].ms, timings[name].ms
    return WholePoint(point.phase, point.batch_size, point.context_tokens, whole, rest, ms["attention"], ms["ffn"])


def ten_in_a_row(bench: Bench, name: str, timings: Mapping[str, Timing]) -> float:
    base = timings[f"ten {BASE}"].ms
    return base + sum((timings[f"ten {one}"].ms - base) / IN_A_ROW for one in bench.ids(name))


def rows_of(bench: Bench, points: Iterable[GridPoint], repeats: int) -> list[dict[str, Any]]:
    """One row per point and judged model: milliseconds measured, and predicted each way."""
    measured = {point: bench.timings(point, repeats) for point in points}
    parts = {
        (point, name): in_parts(bench, point, name, timings)
        for point, timings in measured.items()
        for name in bench.specs
    }
    rows = []
    for point, timings in measured.items():
        fitted = [
            WholeModel(name, SETTING, tuple(parts[at, name] for at in measured if at.phase == point.phase))
            for name in bench.fitted
        ]
        correction = fit_phase(fitted, point.phase).correction
        for name in bench.judged:
            one = parts[point, name]
            corrected = one.rest_ms + correction.overhead_ms
            corrected += correction.attention_factor * one.attention_ms + correction.ffn_factor * one.ffn_ms
            rows.append(
                {
                    "phase": point.phase,
                    "batch_size": point.batch_size,
                    "context_tokens": point.context_tokens,
                    "model": name,
                    "measured": one.whole_ms,
                    "measured_p10": timings[name].ms_p10,
                    "measured_p90": timings[name].ms_p90,
                    "sum": one.parts_ms,
                    "corrected": corrected,
                    "ten in a row": ten_in_a_row(bench, name, timings),
                }
            )
    return rows


def errors(rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, list[float]]:
    """By phase, ``PHASE`` and ``PHASE, saving``: |predicted / measured - 1|, the teacher's time among the former."""
    found: dict[str, list[float]] = {}
    teachers = {
        (row["phase"], row["batch_size"], row["context_tokens"]): row for row in rows if row["model"] == "teacher"
    }
    for row in rows:
        teacher = teachers[row["phase"], row["batch_size"], row["context_tokens"]]
        found.setdefault(row["phase"], []).append(abs(row[way] / row["measured"] - 1))
        if row is not teacher:
            saving = (teacher[way] - row[way]) / (teacher["measured"] - row["measured"])
            found.setdefault(f"{row['phase']}, saving", []).append(abs(saving - 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint whose config gives the shape; default: a Llama of 50M parameters")
    parser.add_argument("--grid", help="a grid file; default: four points")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=12, help="rounds per point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    bench = Bench(args)
    points = grid_points(load(GridFile, locate("grid", args.grid)), bench.shape) if args.grid else POINTS
    rows = rows_of(bench, points, args.repeats)
    summary = {
        way: {what: {"mean": statistics.fmean(of), "worst": max(of)} for what, of in sorted(errors(rows, way).items())}
        for way in WAYS
    }
    for way, of in summary.items():
        print(
            f"{way:<14}"
            + "   ".join(f"{what} {one['mean']:.1%} (worst {one['worst']:.1%})" for what, one in of.items())
        )
    result = {
        "environment": environment(args.device)
        | {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None},
        "settings": {
            "model": args.model or "50M parameters",
            "dtype": args.dtype,
            "held_out": args.held_out,
            "fitted": FITTED + 1,
            "repeats": args.repeats,
            "seed": args.seed,
        },
        "summary": summary,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
